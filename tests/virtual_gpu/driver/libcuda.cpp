// libcuda.so.1, which torch's library for run-time compilation is linked against: enough of it to be loaded, and to say
// that the one device is in use. All else of the driver is the business of the runtime, whose calls never come here.

#include <cstdio>
#include <cstdlib>

#define DRIVER_API extern "C" __attribute__((visibility("default")))

DRIVER_API int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

#define NOT_VIRTUAL(name)                                                              \
  DRIVER_API int name() {                                                              \
    std::fprintf(stderr, "virtual GPU: " #name " of the driver, which has no part\n"); \
    std::abort();                                                                      \
  }

NOT_VIRTUAL(cuCtxGetCurrent)
NOT_VIRTUAL(cuCtxSetCurrent)
NOT_VIRTUAL(cuDeviceGet)
NOT_VIRTUAL(cuDeviceGetAttribute)
NOT_VIRTUAL(cuDevicePrimaryCtxRetain)
NOT_VIRTUAL(cuFuncGetAttribute)
NOT_VIRTUAL(cuFuncSetAttribute)
NOT_VIRTUAL(cuFuncSetCacheConfig)
NOT_VIRTUAL(cuGetErrorString)
NOT_VIRTUAL(cuLaunchCooperativeKernel)
NOT_VIRTUAL(cuLaunchKernel)
NOT_VIRTUAL(cuLinkAddData_v2)
NOT_VIRTUAL(cuLinkComplete)
NOT_VIRTUAL(cuLinkCreate_v2)
NOT_VIRTUAL(cuModuleGetFunction)
NOT_VIRTUAL(cuModuleLoad)
NOT_VIRTUAL(cuModuleLoadData)
NOT_VIRTUAL(cuModuleLoadDataEx)
NOT_VIRTUAL(cuModuleUnload)
NOT_VIRTUAL(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOT_VIRTUAL(cuPointerGetAttribute)
NOT_VIRTUAL(cuTensorMapEncodeTiled)
