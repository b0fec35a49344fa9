// CUDA's vector types, error codes and function attributes, for a build that has no CUDA headers.

#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define ECHO_EMULATED_VECTOR_TYPES(name, type)                                           \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                               \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline constexpr name##2 make_##name##2(type x, type y) { return {x, y}; }             \
  inline constexpr name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

ECHO_EMULATED_VECTOR_TYPES(float, float)
ECHO_EMULATED_VECTOR_TYPES(double, double)
ECHO_EMULATED_VECTOR_TYPES(int, int)
ECHO_EMULATED_VECTOR_TYPES(uint, unsigned int)
ECHO_EMULATED_VECTOR_TYPES(ushort, unsigned short)
ECHO_EMULATED_VECTOR_TYPES(uchar, unsigned char)
#undef ECHO_EMULATED_VECTOR_TYPES

// The values are CUDA's, so that a code in a report means the same in both builds.
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};

// Emulated work is done when the launch returns, so a stream orders nothing.
using cudaStream_t = void*;
