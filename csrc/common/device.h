// The only header through which a source sees CUDA: the toolkit's, or the emulation where ECHO_RT_EMULATED is defined.
//
//   ECHO_SHARED(type, name);       static shared memory of the block; arrays as ECHO_SHARED(float[32], partial)
//   dynamic_shared<T>(count = 1)   T* to the launch's dynamic shared memory; the emulation checks that count of T fit
//   describe_error(error)          what a cudaError_t means; under emulation, what the kernel did wrong

#pragma once

#include <string>

#include "common/host_device.h"

#if defined(ECHO_RT_EMULATED)

#include "emulation/cuda.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace echo {
template <class T>
using SharedType = T;  // lets the type of an array stand before its name
}  // namespace echo

#define ECHO_SHARED(type, name) __shared__ echo::SharedType<type> name

#endif

namespace echo {

#if !defined(ECHO_RT_EMULATED) && defined(__CUDACC__)
template <class T>
__device__ __forceinline__ T* dynamic_shared(size_t = 1) {
  extern __shared__ __align__(128) unsigned char echo_dynamic_shared[];
  return reinterpret_cast<T*>(echo_dynamic_shared);
}
#endif

// To be asked once for each error, by the host thread that got it.
inline std::string describe_error(cudaError_t error) {
  const std::string name = std::string(cudaGetErrorName(error)) + ": ";
#if defined(ECHO_RT_EMULATED)
  const std::string reason = emulation::take_last_error();
  return name + (reason.empty() ? "refused by the launcher" : reason);
#else
  return name + cudaGetErrorString(error);
#endif
}

}  // namespace echo
