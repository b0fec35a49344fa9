// Everything that a kernel sees of CUDA, emulated. Kernels include common/device.h, which includes this.

#pragma once

#include <string>

#include "emulation/barrier.h"
#include "emulation/block.h"
#include "emulation/half.h"
#include "emulation/intrinsics.h"
#include "emulation/tensor_core.h"
#include "emulation/types.h"
#include "emulation/warp.h"
#include "emulation/warpgroup.h"

#define threadIdx (::echo::emulation::thread_index())
#define blockIdx (::echo::emulation::block_index())
#define blockDim (::echo::emulation::block_size())
#define gridDim (::echo::emulation::grid_size())
#define warpSize (::echo::emulation::kWarpSize)

namespace echo {

namespace emulation {

inline const uint3& thread_index() { return current_thread->index; }
inline const uint3& block_index() { return current_block->index; }
inline const dim3& block_size() { return current_block->size; }
inline const dim3& grid_size() { return current_block->grid; }

template <class T>
T& static_shared(const SharedKey& key) {
  static_assert(std::is_trivially_destructible<T>::value, "shared memory is neither constructed nor destroyed");
  return *static_cast<T*>(static_shared(key, sizeof(T), alignof(T)));
}

}  // namespace emulation

template <class T>
T* dynamic_shared(size_t count = 1) {
  return static_cast<T*>(emulation::dynamic_shared_bytes(count * sizeof(T), alignof(T)));
}

}  // namespace echo

// A function's static has an address of its own in every instantiation of a template: that is the allocation's key.
#define ECHO_SHARED(type, name)                                                                      \
  static const ::echo::emulation::SharedKey name##_key{#name, {__builtin_FILE(), __builtin_LINE()}}; \
  [[maybe_unused]] auto& name = ::echo::emulation::static_shared<type>(name##_key)

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
  }
  return "an unknown error";
}

inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// A launch returns its own error: none is left behind for these.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
