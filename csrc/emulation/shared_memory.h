// A block's shared memory: fenced allocations, poisoned for each block. Used by block.cpp alone.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "emulation/block.h"
#include "emulation/report.h"

#if defined(ECHO_RT_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

namespace echo::emulation {

// Between allocations, and around them, lie bytes that nothing may change: far enough to catch a row too many.
inline constexpr size_t kFenceBytes = 1024;
inline constexpr unsigned char kFenceByte = 0xA5, kPoisonByte = 0xFF;
inline constexpr size_t kMaxObjects = 64;
inline constexpr size_t kArenaBytes = kMaxSharedBytes + (kMaxObjects + 2) * kFenceBytes;
// Allocations begin at multiples of these.
inline constexpr size_t kDynamicAlignment = 128, kMinAlignment = 16;

class SharedMemory {
 public:
  // Poisons everything; what a launch gave as dynamic shared memory comes first.
  void start_block(size_t dynamic_bytes);
  // The object of key, made by the first thread that asks. Null where there is no room: refusal() says why.
  void* static_object(const SharedKey& key, size_t bytes, size_t alignment);
  void* dynamic_object(size_t bytes, size_t alignment);
  const std::string& refusal() const { return refusal_; }

  bool contains(const void* address, size_t bytes) const;
  // What was written outside an object; empty where nothing was.
  std::string describe_overrun() const;

 private:
  struct Object {
    const SharedKey* key;
    size_t begin, bytes;
  };

  void* allocate(const SharedKey* key, size_t bytes, size_t alignment);
  static void fence(unsigned char* at);
  static bool is_changed(unsigned char byte) { return byte != kFenceByte; }
  // Bytes from an object's end to the first changed one behind it, or from its beginning back to the first changed one
  // before it; kFenceBytes where the fence is whole.
  static size_t intact_behind(const unsigned char* end);
  static size_t intact_before(const unsigned char* begin);

  std::unique_ptr<unsigned char[]> storage_;
  unsigned char* arena_ = nullptr;
  size_t used_ = 0, static_bytes_ = 0, dynamic_bytes_ = 0;
  std::vector<Object> objects_;
  std::string refusal_;
};

inline void SharedMemory::start_block(size_t dynamic_bytes) {
  if (storage_ == nullptr) {
    storage_ = std::make_unique<unsigned char[]>(kArenaBytes + kFenceBytes);
    arena_ = storage_.get() + (kFenceBytes - reinterpret_cast<uintptr_t>(storage_.get()) % kFenceBytes);
  }
#if defined(ECHO_RT_ADDRESS_SANITIZER)
  ASAN_UNPOISON_MEMORY_REGION(arena_, kArenaBytes);
#endif
  objects_.clear();
  used_ = static_bytes_ = 0;
  dynamic_bytes_ = dynamic_bytes;
  if (dynamic_bytes > 0) allocate(nullptr, dynamic_bytes, kDynamicAlignment);
}

inline void* SharedMemory::static_object(const SharedKey& key, size_t bytes, size_t alignment) {
  for (const Object& object : objects_) {
    if (object.key == &key) return arena_ + object.begin;
  }
  static_bytes_ += bytes;
  if (static_bytes_ > kMaxStaticSharedBytes || static_bytes_ + dynamic_bytes_ > kMaxSharedBytes ||
      objects_.size() == kMaxObjects) {
    refusal_ = std::string("no room for ") + key.name + " (" + place(key.site) + "): " + std::to_string(static_bytes_) +
               " bytes of static shared memory, at most " + std::to_string(kMaxStaticSharedBytes) + ", and " +
               std::to_string(dynamic_bytes_) + " dynamic, at most " + std::to_string(kMaxSharedBytes) + " together";
    return nullptr;
  }
  return allocate(&key, bytes, alignment);
}

inline void* SharedMemory::dynamic_object(size_t bytes, size_t alignment) {
  if (bytes <= dynamic_bytes_ && alignment <= kDynamicAlignment) return arena_ + kFenceBytes;
  refusal_ = std::to_string(bytes) + " bytes of dynamic shared memory, aligned to " + std::to_string(alignment) +
             ", asked of a launch that gave " + std::to_string(dynamic_bytes_) + ", aligned to " +
             std::to_string(kDynamicAlignment);
  return nullptr;
}

inline bool SharedMemory::contains(const void* address, size_t bytes) const {
  const auto* at = static_cast<const unsigned char*>(address);
  return std::any_of(objects_.begin(), objects_.end(), [&](const Object& object) {
    const unsigned char* begin = arena_ + object.begin;
    return at >= begin && at + bytes <= begin + object.bytes;
  });
}

inline std::string SharedMemory::describe_overrun() const {
  // Neighbours share a fence: what lies nearest was overrun.
  size_t nearest = kFenceBytes;
  std::string text;
  for (const Object& object : objects_) {
    const unsigned char* begin = arena_ + object.begin;
    const size_t before = intact_before(begin), behind = intact_behind(begin + object.bytes);
    if (std::min(before, behind) >= nearest) continue;
    nearest = std::min(before, behind);
    text = "written outside " + std::string(object.key != nullptr ? object.key->name : "dynamic shared memory") + " (" +
           std::to_string(object.bytes) + " bytes" + (object.key != nullptr ? ", " + place(object.key->site) : "") +
           "), " + std::to_string(nearest) + " bytes " + (behind <= before ? "behind its end" : "before its beginning");
  }
  return text;
}

inline void* SharedMemory::allocate(const SharedKey* key, size_t bytes, size_t alignment) {
  alignment = std::max(alignment, kMinAlignment);
  const size_t begin = (used_ + kFenceBytes + alignment - 1) / alignment * alignment;
#if defined(ECHO_RT_ADDRESS_SANITIZER)
  ASAN_UNPOISON_MEMORY_REGION(arena_ + begin, bytes);
#endif
  std::memset(arena_ + begin, kPoisonByte, bytes);
  fence(arena_ + begin - kFenceBytes);
  fence(arena_ + begin + bytes);
  objects_.push_back({key, begin, bytes});
  used_ = begin + bytes;
  return arena_ + begin;
}

#if defined(ECHO_RT_ADDRESS_SANITIZER)

// The sanitizer reports an access to a fence itself, a read too.
inline void SharedMemory::fence(unsigned char* at) { ASAN_POISON_MEMORY_REGION(at, kFenceBytes); }
inline size_t SharedMemory::intact_behind(const unsigned char*) { return kFenceBytes; }
inline size_t SharedMemory::intact_before(const unsigned char*) { return kFenceBytes; }

#else

inline void SharedMemory::fence(unsigned char* at) { std::memset(at, kFenceByte, kFenceBytes); }

inline size_t SharedMemory::intact_behind(const unsigned char* end) {
  return static_cast<size_t>(std::find_if(end, end + kFenceBytes, is_changed) - end);
}

inline size_t SharedMemory::intact_before(const unsigned char* begin) {
  const auto last = std::make_reverse_iterator(begin);
  return static_cast<size_t>(std::find_if(last, last + kFenceBytes, is_changed) - last);
}

#endif

}  // namespace echo::emulation
