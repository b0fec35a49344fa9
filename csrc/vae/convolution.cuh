// Convolutions on tensor cores, as matrix products whose left operand is never laid out (implicit GEMM).
//
// A block computes kSide x kSide pixels of one frame by kColumns channels. The sum goes over slabs: a frame of the
// kernel and kDepth channels of x. Of each the block holds a patch, in which all of the kernel's taps find their pixels
// (convolution_patch.cuh), so that x is read from L2 once for all taps; the weights of each tap follow through a ring
// of kStages tiles. Sums are float32 and rounded once, behind bias and residual.
//
// Counts, none measured, for 3x3 taps and 96 channels that come out: a slab is 20.7 KB of patch and 55.3 KB of weights
// for 14.2 MFLOP, 186 FLOP a byte from L2: 2.1 TB/s at 400 TFLOP/s. From shared memory a warp takes 5 KB of fragments
// for 98,304 multiply-adds, 38 FLOP a byte: 10.4 TB/s at 400 TFLOP/s, of the 30 that 132 SMs have at 1.755 GHz. Blocks
// run in the order channels, phases, frames, patches: those that run together share their pixels, and the frames that
// they have in common, in L2. docs/kernels.md has the decoder's operations, level by level.

#pragma once

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/scalar.h"
#include "common/tile.cuh"
#include "common/vec.cuh"
#include "vae/convolution.h"
#include "vae/convolution_patch.cuh"

namespace echo {
namespace convolution {

template <int kColumns>
using Sums = float[kWarpRows][kColumns / kFragmentColumns][4];  // accumulators of a warp

ECHO_DEVICE int divide_up(int64_t value, int by) { return static_cast<int>((value + by - 1) / by); }

// kScale: how many times the picture that comes out is larger than x, its phases being blocks of their own.
template <int kColumns, int kScale>
ECHO_DEVICE Place place_of(const ConvolutionParams& p) {
  unsigned rest = blockIdx.x;
  const auto next = [&](int count) {
    const unsigned of = static_cast<unsigned>(count), index = rest % of;
    rest /= of;
    return static_cast<int>(index);
  };
  Place place;
  place.channel = next(divide_up(p.out_channels, kColumns)) * kColumns;
  place.phase_column = next(kScale);
  place.phase_row = next(kScale);
  place.frame = next(static_cast<int>(p.frames));
  place.column = next(divide_up(p.width, kSide)) * kSide;
  place.row = static_cast<int>(rest) * kSide;
  return place;
}

// sums += patch · weights^T for the warp's pixels, moved on by the tap's place in the kernel.
template <typename T, typename SharedT>
ECHO_DEVICE void multiply(typename SharedT::Left& patch, typename SharedT::Right& weights, int warp_row, int tap,
                          Sums<SharedT::kColumns>& sums) {
  using Left = typename SharedT::Left;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int first = Left::offset(warp_row + tap / SharedT::kSize, lane % 16 + tap % SharedT::kSize, lane / 16);
#pragma unroll 1  // unrolled, the fragments of two depths at once would not fit the registers
  for (int depth = 0; depth < kDepth; depth += kFragment) {
    uint32_t left[kWarpRows][4];
#pragma unroll
    for (int m = 0; m < kWarpRows; ++m) {
      load_matrix_x4(left[m], patch.values + (first ^ depth) + m * Left::kPitch * kDepth);
    }
#pragma unroll
    for (int column = 0; column < SharedT::kColumns; column += 2 * kFragmentColumns) {
      uint32_t right[4];
      load_right_transposed(weights, column, depth, right);
      multiply_pair<T>(sums, left, right, column / kFragmentColumns);
    }
  }
}

// Adds bias and residual to one chunk of a pixel's sums and writes it. `count` of its channels exist; `whole`: all of
// them, on 16 bytes.
template <typename T>
ECHO_DEVICE void finish(const float* sums, const float* bias, const T* residual, T* out, int count, bool whole) {
  float values[kChunk], added[kChunk];
  load_floats(sums, values);
  if (whole) {
    if (bias != nullptr) {
      load_floats(bias, added);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] += added[i];
    }
    if (residual != nullptr) {
      Vec<T>::load(residual).to_floats(added);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] += added[i];
    }
    Vec<T>::from_floats(values).store(out);
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i >= count) return;
    const float sum = bias == nullptr ? values[i] : values[i] + bias[i];
    out[i] = from_float<T>(residual == nullptr ? sum : sum + to_float(residual[i]));
  }
}

// Writes a warp's pixels, a row at a time by way of shared memory: in the accumulators a lane has 4 bytes of a pixel,
// from there whole chunks are read and written.
template <typename T, int kColumns, int kScale>
ECHO_DEVICE void write_out(float (&staging)[kFragment][kColumns + 8], const ConvolutionParams& p, const Place& place,
                           int warp_row, bool whole, const Sums<kColumns>& sums) {
  constexpr int kChunks = kColumns / kChunk;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const T* const residual = static_cast<const T*>(p.residual);
#pragma unroll
  for (int m = 0; m < kWarpRows; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns / kFragmentColumns; ++n) {
      float* low = &staging[lane / kQuad][n * kFragmentColumns + lane % kQuad * 2];
      Vec<float, 2>{{sums[m][n][0], sums[m][n][1]}}.store(low);
      Vec<float, 2>{{sums[m][n][2], sums[m][n][3]}}.store(low + 8 * (kColumns + 8));
    }
    __syncwarp();
    const int y = place.row + warp_row + m;
#pragma unroll 2
    for (int item = lane; item < kFragment * kChunks; item += kWarpThreads) {
      const int pixel = item / kChunks, chunk = item % kChunks, x = place.column + pixel;
      const int channel = place.channel + chunk * kChunk, count = static_cast<int>(p.out_channels) - channel;
      if (y >= height || x >= width || count <= 0) continue;
      const int64_t row = y * kScale + place.phase_row, column = x * kScale + place.phase_column;
      const int64_t at = (row * width * kScale + column) * p.out_channels + channel;
      finish(&staging[pixel][chunk * kChunk], p.bias == nullptr ? nullptr : p.bias + channel,
             residual == nullptr ? nullptr : residual + place.frame * p.residual_frame_stride + at,
             static_cast<T*>(p.out) + place.frame * p.out_frame_stride + at, count, whole);
    }
    __syncwarp();  // the next row goes where this one was
  }
}

// ---- kernel: whole_in, whole_out: chunks of the tensors that are read and written lie on 16 bytes

template <typename T, int kSize, int kColumns, int kScale, bool kWholeIn>
__global__ void __launch_bounds__(kThreads, 2) convolution_kernel(const ConvolutionParams p, bool whole_out) {
  using SharedT = Shared<T, kSize, kColumns>;
  auto& shared = *dynamic_shared<SharedT>();
  auto& ring = shared.ring;
  const Place place = place_of<kColumns, kScale>(p);
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, warp_row = warp * kWarpRows;
  const int channels = static_cast<int>(p.channels);
  const Mover<T, SharedT, kWholeIn> mover(p, place);

  // The copies of the next patch are shared out to the taps of this one, so that they come evenly. All must be under
  // way kTilesAhead taps before they are needed, as that is what a wait leaves running.
  constexpr int kCopies = SharedT::Left::kCopies, kParts = SharedT::kTaps == 1 ? 1 : SharedT::kTaps + 1 - kTilesAhead;
  constexpr int kShare = (kCopies + kParts - 1) / kParts;
  Slab slab, ahead;
#pragma unroll
  for (int i = 0; i < kTilesAhead; ++i) {
    if (i < SharedT::kPatchesAhead) mover.copy_patch(ahead, ring.patches[i], 0, kCopies);
    mover.copy_weights(SharedT::kTaps == 1 ? ahead : slab, SharedT::kTaps == 1 ? 0 : i, ring.weights[i]);
    commit_copies();
    if (i < SharedT::kPatchesAhead) ahead.advance(channels);
  }

  Sums<kColumns> sums = {};
  int held = 0, stage = 0;  // the patch and the tile of weights in use
  while (slab.frame < static_cast<int>(p.kernel_frames)) {
#pragma unroll 1
    for (int tap = 0; tap < SharedT::kTaps; ++tap) {
      wait_copies<kTilesAhead - 1>();
      __syncthreads();  // the tile is there for all, and all are done with the one that the next copies replace
      mover.copy_patch(ahead, ring.patches[held == 0 ? SharedT::kPatches - 1 : held - 1], tap * kShare,
                       min((tap + 1) * kShare, kCopies));
      const bool next = tap + kTilesAhead >= SharedT::kTaps;
      // By number: a reference to one of the two would put both into local memory.
      const Slab of = {next ? ahead.frame : slab.frame, next ? ahead.channel : slab.channel};
      mover.copy_weights(of, SharedT::kTaps == 1 ? 0 : tap + kTilesAhead - (next ? SharedT::kTaps : 0),
                         ring.weights[stage == 0 ? kStages - 1 : stage - 1]);
      commit_copies();
      multiply<T, SharedT>(ring.patches[held], ring.weights[stage], warp_row, tap, sums);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    slab.advance(channels);
    ahead.advance(channels);
    held = held == SharedT::kPatches - 1 ? 0 : held + 1;
  }
  __syncthreads();  // the ring becomes the sums
  write_out<T, kColumns, kScale>(shared.sums[warp], p, place, warp_row, whole_out, sums);
}

// ---- launcher

template <typename T, int kSize, int kColumns, int kScale, bool kWholeIn>
cudaError_t launch_columns(const ConvolutionParams& p, bool whole_out, cudaStream_t stream) {
  const auto tiles = [](int64_t count, int64_t each) { return (count + each - 1) / each; };
  const int64_t blocks =
      tiles(p.out_channels, kColumns) * kScale * kScale * p.frames * tiles(p.height, kSide) * tiles(p.width, kSide);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(convolution_kernel<T, kSize, kColumns, kScale, kWholeIn>, dim3(static_cast<unsigned>(blocks)),
                dim3(kThreads), sizeof(Shared<T, kSize, kColumns>), stream, p, whole_out);
}

// Do all chunks of pixels, and of rows of weights, lie on 16 bytes?
inline bool chunks_fit(const void* tensor, int64_t frames, int64_t frame_stride, int64_t channels) {
  return channels % kChunk == 0 && rows_start_on_chunks(tensor, frames, frame_stride);
}

// A kernel of kernel_frames x kSize x kSize taps, or of 2 x 2 for each phase of a picture kScale times as large.
template <int kSize, int kScale = 1>
cudaError_t launch_convolution(const ConvolutionParams& p, cudaStream_t stream) {
  constexpr int64_t kMost = INT32_MAX;  // offsets in a frame and in the weight are counted in 32 bits
  const int64_t depth = kSize * kSize * p.kernel_frames * p.channels;
  if (p.channels < 1 || p.kernel_frames < 1 || p.frames < 0 || p.height < 0 || p.width < 0 || p.out_channels < 0 ||
      p.frames > kMost || p.height > kMost / kScale - kSide || p.width > kMost / kScale - kSide ||
      p.height * p.width > kMost / p.channels || p.out_channels * kScale * kScale > kMost / depth) {
    return cudaErrorInvalidValue;
  }
  if (p.frames * p.height * p.width * p.out_channels == 0) return cudaSuccess;
  const bool whole_in = chunks_fit(p.x, p.frames + p.kernel_frames - 1, p.x_frame_stride, p.channels) &&
                        chunks_fit(p.weight, 1, 0, p.channels);
  const bool whole_out = chunks_fit(p.out, p.frames, p.out_frame_stride, p.out_channels) &&
                         chunks_fit(p.residual, p.frames, p.residual_frame_stride, p.out_channels) &&
                         rows_start_on_chunks(p.bias, 1, 0);
  return dispatch_16bit(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!whole_in) return launch_columns<T, kSize, kNarrowColumns, kScale, false>(p, whole_out, stream);
    if (p.out_channels <= kNarrowColumns) {
      return launch_columns<T, kSize, kNarrowColumns, kScale, true>(p, whole_out, stream);
    }
    return launch_columns<T, kSize, kWideColumns, kScale, true>(p, whole_out, stream);
  });
}

}  // namespace convolution
}  // namespace echo
