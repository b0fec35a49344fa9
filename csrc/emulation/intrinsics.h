// CUDA's per-thread functions that a host's <cmath> lacks or spells differently.

#pragma once

#include <cmath>
#include <cstdint>

#include "emulation/half.h"

namespace echo::emulation {

inline float reciprocal_square_root(float x) { return 1.0f / std::sqrt(x); }
inline double reciprocal_square_root(double x) { return 1.0 / std::sqrt(x); }

}  // namespace echo::emulation

// Macros, as some C libraries declare functions of these names; <cmath> is in by now, so none sees the macro.
#define rsqrtf(x) (::echo::emulation::reciprocal_square_root(static_cast<float>(x)))
#define rsqrt(x) (::echo::emulation::reciprocal_square_root(static_cast<double>(x)))
#define __expf(x) (::std::exp(static_cast<float>(x)))
#define __exp10f(x) (::std::pow(10.0f, static_cast<float>(x)))
#define __logf(x) (::std::log(static_cast<float>(x)))
#define __log2f(x) (::std::log2(static_cast<float>(x)))
#define __sinf(x) (::std::sin(static_cast<float>(x)))
#define __cosf(x) (::std::cos(static_cast<float>(x)))

#if !defined(__GLIBC__)
inline void sincos(double x, double* sine, double* cosine) { *sine = std::sin(x), *cosine = std::cos(x); }
inline void sincosf(float x, float* sine, float* cosine) { *sine = std::sin(x), *cosine = std::cos(x); }
#endif

inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
// The comparison is false for a NaN, which CUDA takes to zero.
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline int __float2int_rn(float x) { return static_cast<int>(std::lrint(x)); }
inline unsigned int __float2uint_rn(float x) { return static_cast<unsigned int>(std::llrint(x)); }
inline unsigned int __float_as_uint(float x) { return echo::emulation::bits_of(x); }
inline int __float_as_int(float x) { return static_cast<int>(echo::emulation::bits_of(x)); }
inline float __uint_as_float(unsigned int bits) { return echo::emulation::float_of(bits); }
inline float __int_as_float(int bits) { return echo::emulation::float_of(static_cast<uint32_t>(bits)); }

inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}
template <class T>
inline void __stcs(T* address, T value) {
  *address = value;
}

#define ECHO_EMULATED_MIN_MAX(type)                                   \
  inline constexpr type min(type a, type b) { return b < a ? b : a; } \
  inline constexpr type max(type a, type b) { return a < b ? b : a; }
ECHO_EMULATED_MIN_MAX(int)
ECHO_EMULATED_MIN_MAX(unsigned int)
ECHO_EMULATED_MIN_MAX(long)
ECHO_EMULATED_MIN_MAX(unsigned long)
ECHO_EMULATED_MIN_MAX(long long)
ECHO_EMULATED_MIN_MAX(unsigned long long)
#undef ECHO_EMULATED_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// Blocks run one after the other and threads only change where they wait, so there is nothing to order.
inline void __threadfence() {}
inline void __threadfence_block() {}
