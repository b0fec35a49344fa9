// launch(kernel, grid, block, dynamic_shared_bytes, stream, arguments...): `<<<...>>>` on a GPU, fibers under
// emulation.

#pragma once

#include <utility>

#include "common/device.h"

namespace echo {

// Without dynamic shared memory beyond this, a kernel needs no permission.
inline constexpr size_t kDefaultDynamicSharedBytes = 48 << 10;

// An empty grid is no work, not an error. On a GPU the launch is asynchronous and the error is that of the launch
// alone; emulated, the kernel has run when this returns, and describe_error tells what it did wrong.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#if defined(ECHO_RT_EMULATED)
  (void)stream;
  return emulation::launch(kernel, grid, block, dynamic_shared_bytes, std::forward<Arguments>(arguments)...);
#else
  // What is refused is told by what is returned. CUDA would remember it too, and whoever next asks for the last error,
  // as libraries do behind each of their own launches, would take it for theirs.
  const auto told = [](cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error;
  };
  if (dynamic_shared_bytes > kDefaultDynamicSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(dynamic_shared_bytes));
    if (error != cudaSuccess) return told(error);
  }
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = grid;
  configuration.blockDim = block;
  configuration.dynamicSmemBytes = dynamic_shared_bytes;
  configuration.stream = stream;
  return told(cudaLaunchKernelEx(&configuration, kernel, std::forward<Arguments>(arguments)...));
#endif
}

}  // namespace echo
