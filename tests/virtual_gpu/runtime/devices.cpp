#include "devices.h"

#include <cstdio>
#include <cstring>

#include "memory.h"

using namespace virtual_gpu;

VIRTUAL_GPU_API cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice);
}

VIRTUAL_GPU_API cudaError_t cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  Lock lock = hold();
  std::memset(properties, 0, sizeof *properties);
  std::snprintf(properties->name, sizeof properties->name, "Virtual GPU");
  properties->totalGlobalMem = capacity(lock);
  properties->major = kMajor;
  properties->minor = kMinor;
  properties->multiProcessorCount = kMultiprocessors;
  properties->warpSize = kWarp;
  properties->maxThreadsPerBlock = kMaxThreads;
  properties->maxThreadsPerMultiProcessor = kMaxThreadsOfMultiprocessor;
  properties->sharedMemPerBlock = kSharedBytes;
  properties->sharedMemPerBlockOptin = kSharedBytesOnRequest;
  properties->sharedMemPerMultiprocessor = kSharedBytesOfMultiprocessor;
  properties->maxGridSize[0] = kMaxGridX;
  properties->maxGridSize[1] = properties->maxGridSize[2] = kMaxGridYZ;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = kMaxThreads;
  properties->maxThreadsDim[2] = kMaxBlockZ;
  properties->unifiedAddressing = 1;
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = kMajor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = kMinor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(kSharedBytesOnRequest);
      return cudaSuccess;
    default:
      return failed(cudaErrorNotSupported);
  }
}

VIRTUAL_GPU_API cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int) {
  std::snprintf(id, static_cast<size_t>(bytes), "0000:00:00.0");
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
