// Sums and maxima over a warp or a block. Every thread gets the result, and always the same bits.

#pragma once

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

inline constexpr int kWarpThreads = 32;
inline constexpr unsigned int kAllLanes = 0xFFFFFFFF;

ECHO_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

ECHO_DEVICE float warp_max(float value) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// N sums over the kWarps warps of a one-dimensional block, in place, with one barrier. scratch lies in shared memory;
// it is free again after the next barrier of the block, so reductions in a row take turns between two.
template <int kWarps, int N>
ECHO_DEVICE void block_sum(float (&values)[N], float (&scratch)[N * kWarps]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads, warp = static_cast<int>(threadIdx.x) / kWarpThreads;
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = warp_sum(values[i]);
  if (kWarps == 1) return;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[i * kWarps + warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) values[i] += scratch[i * kWarps + w];
  }
}

template <int kWarps>
ECHO_DEVICE float block_sum(float value, float (&scratch)[kWarps]) {
  float values[1] = {value};
  block_sum<kWarps, 1>(values, scratch);
  return values[0];
}

}  // namespace echo
