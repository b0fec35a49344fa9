// One row of channels, spread over the threads of a block and kept in registers between its one read and its one write.
//
// Of a row of `dim` channels thread t holds the chunks t, t + n, t + 2n, ... where n is the number of threads, so that
// neighbouring threads touch neighbouring chunks. A chunk is 16 bytes where rows are made of whole, aligned ones; where
// they are not (an odd width, a view that starts anywhere) it is one channel or a pair, accessed one by one.

#pragma once

#include <cstdint>

#include "common/chunk.cuh"
#include "common/reduce.cuh"
#include "common/row_width.h"

namespace echo {

// ---- how rows are spread

inline constexpr int kMaxRowWarps = kMaxRowThreads / kWarpThreads;

// How one thread holds a row, at compile time: kChunks chunks of kWidth channels.
template <class T, int kWidth_, int kChunks_>
struct RowShape {
  using Element = T;
  static constexpr int kWidth = kWidth_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kShare = kWidth * kChunks;
};

// Calls launch_as(RowShape{}) with the shape for rows of dim channels. `whole` says that they are made of aligned
// 16-byte chunks, and may then have up to 512 · kLargest channels; kOther is the width of a chunk where they are not,
// up to 4096.
template <class T, int kOther, int kLargest = kLargestShare, class LaunchAs>
cudaError_t with_row_shape(int64_t dim, bool whole, LaunchAs&& launch_as) {
  constexpr int kWhole = kVectorBytes / static_cast<int>(sizeof(T));
  const bool usual = dim <= kWidestRow;
  if (usual && !whole) return launch_as(RowShape<T, kOther, kUsualShare / kOther>{});
  if (usual) return launch_as(RowShape<T, kWhole, kUsualShare / kWhole>{});
  if (!whole || dim > kMaxRowThreads * kLargest) return cudaErrorInvalidValue;
  return launch_as(RowShape<T, kWhole, kLargest / kWhole>{});
}

// Threads of the block that takes one row, whole warps. A block a row: 192 threads for 1536 channels, of which a
// multiprocessor runs eight to ten at once (40 to 32 registers a thread), 24 to 30 KiB of rows on their way. What all
// rows share (weights, modulation) is read again for each, from the first-level cache. Rows of less than a warp's share
// waste threads. Reckoned, not measured: no GPU has run this yet.
template <class Shape>
constexpr unsigned row_threads(int64_t dim) {
  const int64_t chunks = (dim + Shape::kWidth - 1) / Shape::kWidth;
  const int64_t holders = (chunks + Shape::kChunks - 1) / Shape::kChunks;
  return static_cast<unsigned>((holders + kWarpThreads - 1) / kWarpThreads * kWarpThreads);
}

// For __launch_bounds__: how many blocks of kMaxRowThreads registers must suffice for. Three are 40 registers a thread,
// and all the threads that sm_86, sm_89 and sm_120 run at once. Shapes that no released model has may take more.
template <class Shape>
inline constexpr int kRowBlocks = Shape::kShare == kUsualShare && Shape::kWidth > 2 ? 3 : 1;

// ---- a thread's share

// The first channel of this thread's chunk; at or past dim the thread has none.
template <class Shape>
ECHO_DEVICE int row_channel(int chunk) {
  return (chunk * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * Shape::kWidth;
}

// This thread's share of a row as it lies in memory. What is past the end of the row is zero.
template <class Shape, class T = typename Shape::Element>
struct RowShare {
  Chunk<T, Shape::kWidth> chunks[Shape::kChunks];

  ECHO_DEVICE void load(const T* row, int dim) {
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int channel = row_channel<Shape>(c);
      chunks[c] = channel < dim ? Chunk<T, Shape::kWidth>::load(row + channel) : Chunk<T, Shape::kWidth>{};
    }
  }

  ECHO_DEVICE void store(T* row, int dim) const {
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int channel = row_channel<Shape>(c);
      if (channel < dim) chunks[c].store(row + channel);
    }
  }

  ECHO_DEVICE void to_floats(float (&values)[Shape::kShare]) const {
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) chunks[c].to_floats(values + c * Shape::kWidth);
  }

  ECHO_DEVICE void from_floats(const float (&values)[Shape::kShare]) {
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) chunks[c].from_floats(values + c * Shape::kWidth);
  }
};

// ---- sums over a row

template <int kSums>
struct RowSums {
  float partial[kSums][kMaxRowWarps];
};

// Replaces each value by its sum over the block, the same bits in every thread. One barrier: `scratch` may be used
// again only behind another one, so successive sums take turns with two of them.
template <int kSums>
ECHO_DEVICE void row_sums(float (&values)[kSums], RowSums<kSums>& scratch) {
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int warps = blockDim.x / kWarpThreads, part = lane % kMaxRowWarps;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const float sum = warp_sum(values[s]);
    if (lane == 0) scratch.partial[s][warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    // Both halves of every warp add up all there is.
    values[s] = part < warps ? scratch.partial[s][part] : 0.0f;
#pragma unroll
    for (int distance = kMaxRowWarps / 2; distance > 0; distance /= 2) {
      values[s] += __shfl_xor_sync(kAllLanes, values[s], distance);
    }
  }
}

}  // namespace echo
