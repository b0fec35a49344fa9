// A softmax over scores that arrive tile by tile: the running maximum and sum of the rows that a lane has a part of.
//
// In an accumulator of mma.m16n8k16 four lanes (a quad) share a row, and a lane holds parts of two rows of it: elements
// 0 and 1 belong to row lane / 4, elements 2 and 3 to row lane / 4 + 8. So 16 * kFragments rows of a warp leave every
// lane with 2 * kFragments of them. The maximum is agreed upon within the quad at every tile; the sum stays the
// lane's own part until the end, where alone it is needed.
//
// A row that has seen no score has maximum -inf and sum 0, and its normalizer is infinite; the kernels see to it that
// every row meets a finite score in the first tile.

#pragma once

#include <cmath>

#include "common/device.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace echo {

template <int kFragments>
struct SoftmaxState {
  static constexpr int kRows = 2 * kFragments;

  float maximum[kRows];
  float sum[kRows];

  ECHO_DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      maximum[r] = -INFINITY;
      sum[r] = 0.0f;
    }
  }

  // Turns a tile of scores into weights 2^(scale * (score - maximum)), which the sum takes in. What was accumulated
  // with earlier weights must be multiplied, row by row, by `correction`.
  template <int kTiles>
  ECHO_DEVICE void absorb(float (&scores)[kFragments][kTiles][4], float scale, float (&correction)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int m = r / 2, first = r % 2 * 2;
      float highest = maximum[r];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        highest = fmaxf(highest, fmaxf(scores[m][n][first], scores[m][n][first + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
      correction[r] = exp2_approximate(scale * (maximum[r] - highest));
      maximum[r] = highest;

      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = first; i < first + 2; ++i) {
          scores[m][n][i] = exp2_approximate(fmaf(scores[m][n][i], scale, -scale * highest));
          added += scores[m][n][i];
        }
      }
      sum[r] = fmaf(sum[r], correction[r], added);
    }
  }

  // 1 / sum of the whole row; every lane of the quad gets it.
  ECHO_DEVICE float normalizer(int r) const {
    float whole = sum[r];
    whole += __shfl_xor_sync(kAllLanes, whole, 1);
    whole += __shfl_xor_sync(kAllLanes, whole, 2);
    return 1.0f / whole;
  }
};

}  // namespace echo
