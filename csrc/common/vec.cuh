// Vec<T>: 16 bytes of T, which one instruction loads or stores.

#pragma once

#include "common/scalar.h"

namespace echo {

template <class T, int N = static_cast<int>(16 / sizeof(T))>
struct alignas(sizeof(T) * N) Vec {
  static constexpr int kSize = N;
  T values[N];

  ECHO_DEVICE T& operator[](int i) { return values[i]; }
  ECHO_DEVICE const T& operator[](int i) const { return values[i]; }

  // address must be a multiple of sizeof(Vec).
  static ECHO_DEVICE Vec load(const T* address) {
#if defined(ECHO_RT_EMULATED)
    emulation::check_aligned(address, sizeof(Vec), "a vector load");
#endif
    return *reinterpret_cast<const Vec*>(address);
  }

  ECHO_DEVICE void store(T* address) const {
#if defined(ECHO_RT_EMULATED)
    emulation::check_aligned(address, sizeof(Vec), "a vector store");
#endif
    *reinterpret_cast<Vec*>(address) = *this;
  }

  // 16-bit types in pairs, which one instruction converts.
  static ECHO_DEVICE Vec from_floats(const float* floats) {
    Vec vec;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const typename Pair<T>::type pair = Pair<T>::from_floats(floats[i], floats[i + 1]);
        vec.values[i] = pair.x;
        vec.values[i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) vec.values[i] = from_float<T>(floats[i]);
    }
    return vec;
  }

  ECHO_DEVICE void to_floats(float* floats) const {
#pragma unroll
    for (int i = 0; i < N; ++i) floats[i] = to_float(values[i]);
  }
};

}  // namespace echo
