// Copies and fills. What makes them wait for the device is CUDA's: memory of the host that is not pinned.

#include <cstring>

#include "capture.h"
#include "engine.h"
#include "memory.h"

using namespace virtual_gpu;

namespace {

Item copying(void* to, const void* from, size_t bytes) {
  Item item;
  item.name = "copy of " + std::to_string(bytes) + " bytes";
  item.memory = {{to, bytes}, {from, bytes}};
  item.work = [=] {
    std::memmove(to, from, bytes);
    return true;
  };
  return item;
}

// The driver reads pageable memory into its own before it returns, so what the host writes there later is not copied.
Item copying_staged(void* to, const void* from, size_t bytes) {
  const char* first = static_cast<const char*>(from);
  auto staged = std::make_shared<std::vector<char>>(first, first + bytes);
  Item item = copying(to, staged->data(), bytes);
  item.memory = {{to, bytes}};
  item.work = [=] {
    std::memcpy(to, staged->data(), bytes);
    return true;
  };
  return item;
}

cudaError_t wait_for_handle(cudaStream_t handle) {
  Lock lock = hold();
  Stream& stream = stream_of(lock, handle);
  return wait_for(std::move(lock), stream);
}

}  // namespace

VIRTUAL_GPU_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                            cudaStream_t handle) {
  bool to_pageable = false;
  bool from_pageable = false;
  {
    Lock lock = hold();
    Stream& stream = stream_of(lock, handle);
    to_pageable = type_of(lock, to) == cudaMemoryTypeUnregistered;
    from_pageable = type_of(lock, from) == cudaMemoryTypeUnregistered;
    if (to_pageable || from_pageable) {
      // A replay would find the memory of back then, if it is there at all.
      if (cudaError_t error = refuse_if_capturing(lock, stream, "a copy of memory that is not pinned")) return error;
    }
  }
  Item item = from_pageable ? copying_staged(to, from, bytes) : copying(to, from, bytes);
  if (cudaError_t error = submit(handle, std::move(item))) return error;
  return to_pageable ? wait_for_handle(handle) : cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  {
    Lock lock = hold();
    if (cudaError_t error = refuse_if_unsafe(lock, "cudaMemcpy")) return error;
  }
  if (cudaError_t error = submit(nullptr, copying(to, from, bytes))) return error;
  return wait_for_handle(nullptr);
}

VIRTUAL_GPU_API cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t handle) {
  Item item;
  item.name = "fill of " + std::to_string(bytes) + " bytes";
  item.memory = {{address, bytes}};
  item.work = [=] {
    std::memset(address, value, bytes);
    return true;
  };
  return submit(handle, std::move(item));
}
