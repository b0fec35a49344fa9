#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "capture.h"
#include "engine.h"

namespace virtual_gpu {
namespace {

struct Block {
  size_t bytes;
  cudaMemoryType type;
  bool freed;
};

constexpr size_t kDefaultCapacity = size_t{6} << 30;
// Fresh memory is full of these: as float32, bfloat16 and float16 they are NaN.
constexpr int kFresh = 0xff;

// By address. Blocks that were freed stay, and their addresses are never given out again.
std::map<const char*, Block>& blocks() {
  static auto* all = new std::map<const char*, Block>;
  return *all;
}

size_t used = 0;

std::map<const char*, Block>::iterator find(const void* address) {
  const char* byte = static_cast<const char*>(address);
  auto it = blocks().upper_bound(byte);
  if (it == blocks().begin()) return blocks().end();
  --it;
  return byte < it->first + it->second.bytes ? it : blocks().end();
}

cudaError_t allocate(const Lock& lock, void** address, size_t bytes, cudaMemoryType type) {
  *address = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (type == cudaMemoryTypeDevice && used + bytes > capacity(lock)) return failed(cudaErrorMemoryAllocation);
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return failed(cudaErrorMemoryAllocation);
  std::memset(found, kFresh, bytes);
  blocks()[static_cast<char*>(found)] = {bytes, type, false};
  if (type == cudaMemoryTypeDevice) used += bytes;
  *address = found;
  return cudaSuccess;
}

// Freed pages stay reserved and cannot be touched: who uses them is stopped, and not shown another's values.
cudaError_t release(const Lock& lock, void* address, cudaMemoryType type) {
  auto it = blocks().find(static_cast<char*>(address));
  if (it == blocks().end() || it->second.type != type || it->second.freed) {
    complain(lock, "memory is freed that is not allocated");
    return failed(cudaErrorInvalidValue);
  }
  Block& block = it->second;
  block.freed = true;
  if (type == cudaMemoryTypeDevice) used -= block.bytes;
  madvise(address, block.bytes, MADV_DONTNEED);
  mprotect(address, block.bytes, PROT_NONE);
  return cudaSuccess;
}

cudaError_t synchronizing_release(void* address, cudaMemoryType type, const char* call) {
  if (address == nullptr) return cudaSuccess;
  Lock lock = hold();
  if (cudaError_t error = refuse_if_unsafe(lock, call)) return error;
  cudaError_t fault = wait_for_all(std::move(lock));
  if (fault != cudaSuccess) return fault;
  return release(hold(), address, type);
}

}  // namespace

size_t capacity(const Lock&) {
  static const char* given = std::getenv("ECHO_RT_VIRTUAL_GPU_BYTES");
  static size_t bytes = given == nullptr ? kDefaultCapacity : std::strtoull(given, nullptr, 10);
  return bytes;
}

cudaMemoryType type_of(const Lock&, const void* address) {
  auto it = find(address);
  return it == blocks().end() || it->second.freed ? cudaMemoryTypeUnregistered : it->second.type;
}

bool all_allocated(const Lock&, const std::vector<Range>& ranges) {
  for (const Range& range : ranges) {
    auto it = find(range.begin);
    if (it == blocks().end()) continue;  // the host's own
    const char* end = static_cast<const char*>(range.begin) + range.bytes;
    if (it->second.freed || end > it->first + it->second.bytes) return false;
  }
  return true;
}

}  // namespace virtual_gpu

using namespace virtual_gpu;

VIRTUAL_GPU_API cudaError_t cudaMalloc(void** address, size_t bytes) {
  Lock lock = hold();
  if (cudaError_t error = refuse_if_unsafe(lock, "cudaMalloc")) return error;
  return allocate(lock, address, bytes, cudaMemoryTypeDevice);
}

VIRTUAL_GPU_API cudaError_t cudaFree(void* address) {
  return synchronizing_release(address, cudaMemoryTypeDevice, "cudaFree");
}

VIRTUAL_GPU_API cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  Lock lock = hold();
  if (cudaError_t error = refuse_if_unsafe(lock, "cudaHostAlloc")) return error;
  return allocate(lock, address, bytes, cudaMemoryTypeHost);
}

VIRTUAL_GPU_API cudaError_t cudaFreeHost(void* address) {
  return synchronizing_release(address, cudaMemoryTypeHost, "cudaFreeHost");
}

VIRTUAL_GPU_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  Lock lock = hold();
  std::memset(attributes, 0, sizeof *attributes);
  attributes->type = type_of(lock, address);
  if (attributes->type == cudaMemoryTypeUnregistered) return cudaSuccess;
  attributes->devicePointer = const_cast<void*>(address);
  attributes->hostPointer = const_cast<void*>(address);
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Lock lock = hold();
  *total = capacity(lock);
  *free = *total - used;
  return cudaSuccess;
}
