// Kernels compiled by nvcc: their launches are checked and take their place in the streams, and compute nothing. What
// they would compute is submitted beside them by a caller who says so; any other launch is an error.

#include "launches.h"

#include <cxxabi.h>

#include <cstdlib>
#include <unordered_map>

#include "devices.h"
#include "engine.h"

using namespace virtual_gpu;

namespace {

struct Launch {
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  cudaStream_t stream;
};

thread_local bool computed_beside = false;

// What <<<...>>> says, between the two calls that nvcc makes of it.
thread_local std::vector<Launch> configured;

std::unordered_map<const void*, std::string>& names() {
  static auto* all = new std::unordered_map<const void*, std::string>;
  return *all;
}

// The shared memory that each kernel asked for with cudaFuncSetAttribute.
std::unordered_map<const void*, size_t>& shared_limits() {
  static auto* all = new std::unordered_map<const void*, size_t>;
  return *all;
}

std::string name_of(const Lock&, const void* kernel) {
  auto found = names().find(kernel);
  if (found == names().end()) return "a kernel that is not registered";
  char* readable = abi::__cxa_demangle(found->second.c_str(), nullptr, nullptr, nullptr);
  std::string name = readable == nullptr ? found->second : readable;
  std::free(readable);
  return name;
}

cudaError_t check(const Lock& lock, const void* kernel, const Launch& launch) {
  const dim3& grid = launch.grid;
  const dim3& block = launch.block;
  size_t threads = size_t{block.x} * block.y * block.z;
  bool fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= kMaxGridX && grid.y <= kMaxGridYZ &&
              grid.z <= kMaxGridYZ && threads > 0 && threads <= kMaxThreads && block.z <= kMaxBlockZ;
  if (!fits) {
    complain(lock, "grid or block that no device has: " + name_of(lock, kernel));
    return failed(cudaErrorInvalidConfiguration);
  }
  auto asked = shared_limits().find(kernel);
  size_t limit = asked == shared_limits().end() ? kSharedBytes : asked->second;
  if (launch.shared_bytes > limit) {
    complain(lock, "more shared memory than was asked for: " + name_of(lock, kernel));
    return failed(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t launch_kernel(const void* kernel, const Launch& launch) {
  Item item;
  {
    Lock lock = hold();
    if (cudaError_t error = check(lock, kernel, launch)) return error;
    machine().launches++;
    item.name = name_of(lock, kernel);
    if (!computed_beside) {
      complain(lock, "nothing computes what is launched: " + item.name);
      return failed(cudaErrorNoKernelImageForDevice);
    }
  }
  return submit(launch.stream, std::move(item));
}

}  // namespace

void virtual_gpu::launches_are_computed_beside(bool so) { computed_beside = so; }

VIRTUAL_GPU_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared_bytes,
                                               cudaStream_t stream) {
  return launch_kernel(kernel, {grid, block, shared_bytes, stream});
}

VIRTUAL_GPU_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return launch_kernel(kernel, {config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream});
}

VIRTUAL_GPU_API cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  Lock lock = hold();
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kSharedBytesOnRequest) {
    complain(lock, "more shared memory than a device has: " + name_of(lock, kernel));
    return failed(cudaErrorInvalidValue);
  }
  shared_limits()[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

// ---- what nvcc compiles <<<...>>> and kernels into

VIRTUAL_GPU_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
  configured.push_back({grid, block, shared_bytes, stream});
  return 0;
}

VIRTUAL_GPU_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  const Launch& launch = configured.back();
  *grid = launch.grid;
  *block = launch.block;
  *shared_bytes = launch.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = launch.stream;
  configured.pop_back();
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

VIRTUAL_GPU_API void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*,
                                            dim3*, dim3*, int*) {
  Lock lock = hold();
  names()[function] = name;
}

VIRTUAL_GPU_API void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

VIRTUAL_GPU_API void __cudaRegisterFatBinaryEnd(void**) {}
VIRTUAL_GPU_API void __cudaUnregisterFatBinary(void**) {}
VIRTUAL_GPU_API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
VIRTUAL_GPU_API char __cudaInitModule(void**) { return 0; }
