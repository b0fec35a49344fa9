// The element types of tensors: named at run time by ScalarType, at compile time by float, __nv_bfloat16 and __half.

#pragma once

#include <cstdint>

#include "common/device.h"

#if defined(__CUDACC__) || defined(ECHO_RT_EMULATED)
#define ECHO_DEVICE __device__ __forceinline__
#else
#define ECHO_DEVICE inline
#endif

namespace echo {

enum class ScalarType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(ScalarType type) { return type == ScalarType::kFloat32 ? 4 : 2; }

ECHO_DEVICE float to_float(float value) { return value; }
ECHO_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
ECHO_DEVICE float to_float(__half value) { return __half2float(value); }

namespace detail {
ECHO_DEVICE void convert(float value, float& out) { out = value; }
ECHO_DEVICE void convert(float value, __nv_bfloat16& out) { out = __float2bfloat16_rn(value); }
ECHO_DEVICE void convert(float value, __half& out) { out = __float2half_rn(value); }
}  // namespace detail

// Rounds to nearest, ties to even.
template <class T>
ECHO_DEVICE T from_float(float value) {
  T out;
  detail::convert(value, out);
  return out;
}

// Two neighbours of a 16-bit type, the first in the low half: what a fragment register of an mma holds.
template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static ECHO_DEVICE type from_floats(float low, float high) { return __floats2bfloat162_rn(low, high); }
  static ECHO_DEVICE float2 to_floats(type pair) { return __bfloat1622float2(pair); }
};
template <>
struct Pair<__half> {
  using type = __half2;
  static ECHO_DEVICE type from_floats(float low, float high) { return __floats2half2_rn(low, high); }
  static ECHO_DEVICE float2 to_floats(type pair) { return __half22float2(pair); }
};

template <class T>
ECHO_DEVICE uint32_t pack(float low, float high) {
  union {
    typename Pair<T>::type pair;
    uint32_t bits;
  } both;
  both.pair = Pair<T>::from_floats(low, high);
  return both.bits;
}

template <class T>
ECHO_DEVICE float2 unpack(uint32_t bits) {
  union {
    uint32_t bits;
    typename Pair<T>::type pair;
  } both;
  both.bits = bits;
  return Pair<T>::to_floats(both.pair);
}

// ---- from the run-time name to the type
//
//   return dispatch(p.dtype, [&](auto tag) {
//     using T = typename decltype(tag)::type;
//     return launch(kernel<T>, grid, block, 0, stream, p);
//   });

template <class T>
struct TypeTag {
  using type = T;
};

template <class Function>
cudaError_t dispatch(ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::kFloat32:
      return function(TypeTag<float>{});
    case ScalarType::kBFloat16:
      return function(TypeTag<__nv_bfloat16>{});
    case ScalarType::kFloat16:
      return function(TypeTag<__half>{});
  }
  return cudaErrorInvalidValue;
}

// For kernels on tensor cores, which have no float32.
template <class Function>
cudaError_t dispatch_16bit(ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::kBFloat16:
      return function(TypeTag<__nv_bfloat16>{});
    case ScalarType::kFloat16:
      return function(TypeTag<__half>{});
    case ScalarType::kFloat32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace echo
