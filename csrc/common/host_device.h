// What lets one function be compiled for the host and for the GPU.

#pragma once

#if defined(__CUDACC__)
#define ECHO_HOST_DEVICE __host__ __device__
#else
#define ECHO_HOST_DEVICE
#endif
