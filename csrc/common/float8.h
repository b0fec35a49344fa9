// Float8 as e4m3fn: one sign bit, four of exponent, three of mantissa, no infinity. A value is kept as its eight bits.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

inline constexpr float kFloat8Max = 448.0f;

// The bits of `value` rounded to nearest, ties to even; beyond 448 it is 448, a NaN stays one. The same as the GPU's
// own conversion (pack_float8 in ptx.cuh), for architectures that have none.
ECHO_DEVICE uint32_t float8_bits(float value) {
  constexpr uint32_t kInfinity = 0x7F800000, kSmallestNormal = 0x3C800000, kLargest = 0x43E00000;
  constexpr uint32_t kNaN = 0x7F, kLargestBits = 0x7E;
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFF;
  const uint32_t sign = (bits >> 24) & 0x80;
  if (magnitude > kInfinity) return kNaN;
  if (magnitude >= kLargest) return sign | kLargestBits;
  if (magnitude < kSmallestNormal) {
    // One unit in the last place of 2^14 is 2^-9, the step of the subnormals: the addition rounds for us.
    constexpr float kTwoTo14 = 16384.0f;
    return sign | (__float_as_uint(__fadd_rn(__uint_as_float(magnitude), kTwoTo14)) - __float_as_uint(kTwoTo14));
  }
  // 120 is the difference of the two exponent biases.
  const uint32_t rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1);
  return sign | ((rounded - (120u << 23)) >> 20);
}

}  // namespace echo
