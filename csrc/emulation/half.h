// __nv_bfloat16 and __half with CUDA's names: bit patterns, and conversions that round to nearest, ties to even.

#pragma once

#include <cstdint>
#include <cstring>

#include "emulation/types.h"

namespace echo::emulation {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = bits_of(value);
  // Rounding could carry a NaN's mantissa into infinity.
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float bfloat16_value(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline uint16_t half_bits(float value) {
  constexpr uint32_t kTwoTo16 = 0x47800000, kSmallestNormal = 0x38800000, kOneHalf = 0x3F000000;
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFF;
  const uint32_t sign = (bits >> 16) & 0x8000;
  if (magnitude > 0x7F800000) return 0x7FFF;
  if (magnitude >= kTwoTo16) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude < kSmallestNormal) {
    // One unit in the last place of 0.5 is 2^-24, the step of half's subnormals: the addition rounds for us.
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - kOneHalf));
  }
  // 112 is the difference of the two exponent biases; a carry out of the largest finite value yields infinity.
  const uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

inline float half_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = static_cast<uint32_t>(bits & 0x7FFF) << 13;
  if ((bits & 0x7C00) == 0x7C00) return float_of(sign | 0x7F800000 | rest);
  constexpr uint32_t kTwoTo112 = (127u + 112u) << 23;
  return float_of(sign | bits_of(float_of(rest) * float_of(kTwoTo112)));
}

}  // namespace echo::emulation

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {echo::emulation::bfloat16_bits(value)}; }
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return echo::emulation::bfloat16_value(value.bits); }
inline __half __float2half_rn(float value) { return {echo::emulation::half_bits(value)}; }
inline __half __float2half(float value) { return __float2half_rn(value); }
inline float __half2float(__half value) { return echo::emulation::half_value(value.bits); }

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {__bfloat162float(pair.x), __bfloat162float(pair.y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
