// The gate that blends the memory's old state and its candidate: product over both, sigmoid and blend in one kernel.
//
//   c[r] = candidate[r] / sqrt(mean(candidate[r]^2) + eps) * norm
//   out[r] = g * old[r] + (1 - g) * c[r],   g = sigmoid(W[:, :dim] old[r] + W[:, dim:] c[r] + b)
//
// old, candidate, out [R, dim], W = gate_weight [dim, 2 * dim]. Products, norm, sigmoid and blend are float32; c is
// rounded to the storage type for the product alone, and the blend has it in float32 from the candidate again.
//
// A matrix product with a left operand from two tensors: its depth is walked in tiles, first all of old, then all of
// the candidate, through a ring of kStages stages. Weights and old go to shared memory by cp.async. The candidate
// passes through registers, to be normalized on its way: it is loaded before the product of another tile, and scaled
// and stored after it. Its norm needs whole rows: while the tiles of old are under way, the same loads go over the
// candidate a first time for the squares, so that no prologue waits for them. dim need not be a multiple of the tiles'
// depth: each half ends in zeros.
//
// Counts, none measured: 4 * R * dim^2 operations; each block reads its rows of old once and of the candidate twice,
// and its columns of the weights. docs/kernels.md has the bytes at the released sizes.

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/scalar.h"
#include "common/tile.cuh"
#include "common/vec.cuh"
#include "memory/gated_update.h"

namespace echo {
namespace {

// ---- traits

// 64 x 64 a warp: 4 KB of fragments from shared memory (32 clocks of its bandwidth) for 32 mma (51 clocks); a smaller
// tile would make shared memory the limit, a larger one has no registers for its sums.
constexpr int kWarpTile = 64;
constexpr int kWarpsAcross = 2;
constexpr int kWarps = kWarpsAcross * kWarpsAcross;
constexpr int kThreads = kWarps * kWarpThreads;
constexpr int kTile = kWarpsAcross * kWarpTile;  // rows and columns of a block; two blocks fill an SM's registers
constexpr int kFragments = kWarpTile / kFragment;
// 4 stages of depth 32 are 64 KB: two blocks fit an SM of 164 KB or more, one the 100 KB of sm_86, sm_89 and sm_120,
// with three tiles under way. Depth 64 would halve the barriers and leave a single stage under way.
constexpr int kDepth = 32;
constexpr int kStages = 4;
constexpr int kChunksDeep = kDepth / kChunk;
constexpr int kRowsApart = kThreads / kChunksDeep;  // of the rows whose chunks one thread moves
constexpr int kMoves = kTile / kRowsApart;
// Floats from one row of staged logits to the next: rows 8 banks apart let the lanes of a store meet all 32 banks.
constexpr int kLogitPitch = kWarpTile + 8;

// ---- shared memory

template <typename T>
struct UpdateShared {
  struct Stage {
    Tile<T, kTile, kDepth> left;    // [rows, depth] of old, or of the normalized candidate
    Tile<T, kTile, kDepth> weight;  // [columns, depth]
  };
  union {
    Stage stages[kStages];
    float logits[kWarps][kFragment][kLogitPitch];  // after the product: what a warp stages to write whole chunks
  };
  float factor[kTile];  // 1 / root mean square of the candidate's rows
};
static_assert(sizeof(UpdateShared<uint16_t>) == 64 * 1024 + 512);

using Sums = float[kFragments][kWarpTile / kFragmentColumns][4];  // accumulators of a warp

// ---- device helpers

// Tiles that the depth of one half makes.
ECHO_DEVICE int tiles_deep(int64_t dim) { return static_cast<int>((dim + kDepth - 1) / kDepth); }

// What a thread has in registers of the candidate while a product runs. Words: taken apart into 16-bit values they
// would have to have arrived before that product, which is there to hide their journey.
using Words = Vec<uint32_t>;
struct Fetched {
  Words candidate[kMoves];
  float norm[kChunk] = {};  // for the second half
};

// What one thread moves from global memory: of every tile chunk `chunk_` of rows row_, row_ + kRowsApart, ... The lanes
// of a quad have the four chunks of the same rows. What does not exist, past the last row or column, is zero.
template <typename T>
class Mover {
 public:
  ECHO_DEVICE Mover(const GatedUpdateParams& p, UpdateShared<T>& shared, int64_t first_row, int64_t first_column)
      : p_(p),
        shared_(shared),
        chunk_(static_cast<int>(threadIdx.x) % kChunksDeep),
        row_(static_cast<int>(threadIdx.x) / kChunksDeep),
        rows_left_(static_cast<int>(min(p.rows - first_row, static_cast<int64_t>(kTile))) - row_),
        weights_left_(static_cast<int>(min(p.dim - first_column, static_cast<int64_t>(kTile))) - row_),
        old_(static_cast<const T*>(p.old) + (first_row + row_) * p.old_row_stride + chunk_ * kChunk),
        candidate_(static_cast<const T*>(p.candidate) + (first_row + row_) * p.candidate_row_stride + chunk_ * kChunk),
        weight_(static_cast<const T*>(p.gate_weight) + (first_column + row_) * p.weight_row_stride + chunk_ * kChunk) {}

  // Starts the copies of a tile of weights, and of old where the tile is in the first half.
  ECHO_DEVICE void copy(int tile, bool is_old) {
    const int column = column_of(tile, is_old);
    const bool there = is_there(column);
    auto& stage = shared_.stages[tile % kStages];
    const int target = stage.left.offset(row_, chunk_);
    const T* weight = weight_ + (is_old ? column : p_.dim + column);
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      copy_async_16(stage.weight.values + target + i * kRowsApart * kDepth,
                    weight + i * kRowsApart * p_.weight_row_stride, there && i * kRowsApart < weights_left_);
    }
    if (!is_old) return;
    const T* old = old_ + column;
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      copy_async_16(stage.left.values + target + i * kRowsApart * kDepth, old + i * kRowsApart * p_.old_row_stride,
                    there && i * kRowsApart < rows_left_);
    }
  }

  // Loads the candidate's chunks of a tile: for their squares in the first half, as the left operand in the second.
  ECHO_DEVICE void load(int tile, bool is_old, Fetched& fetched) const {
    const int column = column_of(tile, is_old);
    const bool there = is_there(column);
    const T* source = candidate_ + column;
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      const T* row = source + i * kRowsApart * p_.candidate_row_stride;
      fetched.candidate[i] =
          there && i * kRowsApart < rows_left_ ? Words::load(reinterpret_cast<const uint32_t*>(row)) : Words{};
    }
    if (!is_old && there) load_floats(p_.norm + column + chunk_ * kChunk, fetched.norm);
  }

  ECHO_DEVICE void add_squares(const Fetched& fetched) {
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
#pragma unroll
      for (int j = 0; j < Words::kSize; ++j) {
        const float2 pair = unpack<T>(fetched.candidate[i][j]);
        factor_[i] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, factor_[i]));
      }
    }
  }

  // Behind the last squares: makes the rows' factors of them, here and in shared memory.
  ECHO_DEVICE void finish_factors() {
    const float per_dim = 1.0f / static_cast<float>(p_.dim);
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      factor_[i] += __shfl_xor_sync(kAllLanes, factor_[i], 1);
      factor_[i] += __shfl_xor_sync(kAllLanes, factor_[i], 2);
      factor_[i] = rsqrtf(fmaf(factor_[i], per_dim, p_.eps));
      if (chunk_ == 0) shared_.factor[row_ + i * kRowsApart] = factor_[i];
    }
  }

  ECHO_DEVICE void store_normalized(int tile, const Fetched& fetched) {
    const auto& norm = fetched.norm;
    auto& left = shared_.stages[tile % kStages].left;
    T* target = left.values + left.offset(row_, chunk_);
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      Words normalized;
#pragma unroll
      for (int j = 0; j < Words::kSize; ++j) {
        const float2 pair = unpack<T>(fetched.candidate[i][j]);
        normalized[j] = pack<T>(pair.x * factor_[i] * norm[2 * j], pair.y * factor_[i] * norm[2 * j + 1]);
      }
      normalized.store(reinterpret_cast<uint32_t*>(target + i * kRowsApart * kDepth));
    }
  }

 private:
  // The first column of a tile in its half.
  ECHO_DEVICE int column_of(int tile, bool is_old) const {
    return (is_old ? tile : tile - tiles_deep(p_.dim)) * kDepth;
  }

  ECHO_DEVICE bool is_there(int column) const { return column + chunk_ * kChunk < static_cast<int>(p_.dim); }

  const GatedUpdateParams& p_;
  UpdateShared<T>& shared_;
  const int chunk_, row_;
  const int rows_left_, weights_left_;   // from row_ on, in the block's tile
  const T *old_, *candidate_, *weight_;  // this thread's first chunk
  float factor_[kMoves] = {};            // the rows' sums of squares, until finish_factors()
};

// sums += left weight^T for the warp's rows and columns and one tile's depth.
template <typename T>
ECHO_DEVICE void multiply(typename UpdateShared<T>::Stage& stage, int warp_row, int warp_column, Sums& sums) {
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += kFragment) {
    uint32_t left[kFragments][4];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) load_left(stage.left, warp_row + m * kFragment, depth, left[m]);
#pragma unroll
    for (int column = 0; column < kWarpTile; column += 2 * kFragmentColumns) {
      uint32_t weight[4];
      load_right_transposed(stage.weight, warp_column + column, depth, weight);
      multiply_pair<T>(sums, left, weight, column / kFragmentColumns);
    }
  }
}

// Makes gates of the sums, blends and writes, 16 rows at a time by way of shared memory: in the accumulators a lane has
// 4 bytes of a row, from there whole chunks are read, blended and written.
template <typename T>
ECHO_DEVICE void blend(float (&logits)[kFragment][kLogitPitch], const float* factors, const GatedUpdateParams& p,
                       int64_t first_row, int64_t first_column, const Sums& sums) {
  constexpr int kChunks = kWarpTile / kChunk;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads, chunk = lane % kChunks;
  const int64_t column = first_column + chunk * kChunk;
  const bool there = column < p.dim;
  float norm[kChunk] = {}, bias[kChunk] = {};
  if (there) {
    load_floats(p.norm + column, norm);
    Vec<T>::load(static_cast<const T*>(p.gate_bias) + column).to_floats(bias);
  }
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int n = 0; n < kWarpTile / kFragmentColumns; ++n) {
      float* low = &logits[lane / kQuad][n * kFragmentColumns + lane % kQuad * 2];
      Vec<float, 2>{{sums[m][n][0], sums[m][n][1]}}.store(low);
      Vec<float, 2>{{sums[m][n][2], sums[m][n][3]}}.store(low + 8 * kLogitPitch);
    }
    __syncwarp();
#pragma unroll 2
    for (int row = lane / kChunks; row < kFragment; row += kWarpThreads / kChunks) {
      const int64_t global_row = first_row + m * kFragment + row;
      if (!there || global_row >= p.rows) break;
      float old[kChunk], candidate[kChunk], logit[kChunk];
      Vec<T>::load(static_cast<const T*>(p.old) + global_row * p.old_row_stride + column).to_floats(old);
      Vec<T>::load(static_cast<const T*>(p.candidate) + global_row * p.candidate_row_stride + column)
          .to_floats(candidate);
      load_floats(&logits[row][chunk * kChunk], logit);
      const float factor = factors[m * kFragment + row];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const float gate = __fdividef(1.0f, 1.0f + __expf(-(logit[j] + bias[j])));
        old[j] = gate * old[j] + (1.0f - gate) * (candidate[j] * factor * norm[j]);
      }
      Vec<T>::from_floats(old).store(static_cast<T*>(p.out) + global_row * p.out_row_stride + column);
    }
    __syncwarp();  // the next 16 rows go where these were
  }
}

// ---- kernel: grid (tiles of columns, tiles of rows), so that blocks that run together share few rows and all weights

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) gated_update_kernel(const GatedUpdateParams p) {
  auto& shared = *dynamic_shared<UpdateShared<T>>();
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTile;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int warp_row = warp / kWarpsAcross * kWarpTile, warp_column = warp % kWarpsAcross * kWarpTile;
  const int tiles_of_old = tiles_deep(p.dim), tiles = 2 * tiles_of_old;

  Mover<T> mover(p, shared, first_row, first_column);
  const auto start = [&](int tile, Fetched& fetched) {
    if (tile < tiles) {
      mover.copy(tile, tile < tiles_of_old);
      mover.load(tile, tile < tiles_of_old, fetched);
    }
    commit_copies();  // an empty group past the last tile, so that waiting counts tiles
  };
  const auto settle = [&](int tile, const Fetched& fetched) {
    if (tile < tiles_of_old) {
      mover.add_squares(fetched);
      if (tile == tiles_of_old - 1) mover.finish_factors();
    } else if (tile < tiles) {
      mover.store_normalized(tile, fetched);
    }
  };

  Fetched first[kStages - 1];
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) start(tile, first[tile]);
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) settle(tile, first[tile]);

  Sums sums = {};
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the tile is there for all, and all are done with the stage that the next copies take
    Fetched fetched;
    start(tile + kStages - 1, fetched);
    multiply<T>(shared.stages[tile % kStages], warp_row, warp_column, sums);
    settle(tile + kStages - 1, fetched);
  }
  __syncthreads();  // the stages become the logits
  blend<T>(shared.logits[warp], shared.factor + warp_row, p, first_row + warp_row, first_column + warp_column, sums);
}

}  // namespace

// ---- launcher

cudaError_t launch_gated_update(const GatedUpdateParams& p, cudaStream_t stream) {
  constexpr int64_t kMaxDim = INT32_MAX / 4, kMaxRows = static_cast<int64_t>(kTile) * 65535;  // 32 bits, grid.y
  if (p.dim < kFragment || p.dim % kFragment != 0 || p.dim > kMaxDim || p.rows < 0 || p.rows > kMaxRows ||
      !rows_start_on_chunks(p.old, p.rows, p.old_row_stride) ||
      !rows_start_on_chunks(p.candidate, p.rows, p.candidate_row_stride) ||
      !rows_start_on_chunks(p.gate_weight, p.dim, p.weight_row_stride) ||
      !rows_start_on_chunks(p.out, p.rows, p.out_row_stride) || !rows_start_on_chunks(p.norm, 1, 0) ||
      !rows_start_on_chunks(p.gate_bias, 1, 0)) {
    return cudaErrorInvalidValue;
  }
  if (p.rows == 0) return cudaSuccess;
  return dispatch_16bit(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>((p.dim + kTile - 1) / kTile),
                    static_cast<unsigned>((p.rows + kTile - 1) / kTile));
    return launch(gated_update_kernel<T>, grid, dim3(kThreads), sizeof(UpdateShared<T>), stream, p);
  });
}

}  // namespace echo
