// Attention of the memory queries over the evicted keys and values, their RMSNorm fused.
//
//   out[m, h] = sum_t softmax_t(n[m, h] . k[t, h] / sqrt(d)) v[t, h],   n[m] = q[m] / sqrt(mean(q[m]^2) + eps) * norm_q
//
// q, out [M, H * d], k, v [T, H, d]; no mask. The mean is over the whole row, all heads. Scores, softmax and sums are
// float32; n and the softmax weights are rounded to the storage type where the tensor cores take them.
//
// A block computes kQueries rows of one head, four warps of 32 rows. Keys and values come as one stream of tiles, K0 V0
// K1 V1 ..., through a ring of kSlots slots in shared memory, so that the next tiles are under way while the tensor
// cores work on this one, and the online softmax (SoftmaxState) keeps scores from ever leaving registers.
//
// The norm needs whole rows, and a block has one head. Each block therefore reads its kQueries rows whole once more,
// while its first keys are under way: kQueries * H * d elements beside the 2 * T * d of keys and values that it reads
// anyhow, all of which L2 holds. A pre-pass would need a workspace for its factors and a launch of its own.
//
// Counts, none measured: 4 * M * T * H * d operations; docs/kernels.md has the bytes at the released sizes.

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/scalar.h"
#include "common/tile.cuh"
#include "common/vec.cuh"
#include "memory/memory_attention.h"
#include "memory/softmax_state.cuh"

namespace echo {
namespace {

// ---- traits

// 32 rows a warp: every K or V fragment read from shared memory (4 clocks of its bandwidth for ldmatrix.x4) then feeds
// four mma (6.4 clocks); with 16 rows it would feed two, and shared memory would be the limit.
constexpr int kWarpRows = 32;
constexpr int kRowFragments = kWarpRows / kFragment;
// 4 warps: with 128 accumulators for d = 128, 64 scores and what is left for addresses, a lane needs nearly all 255
// registers there are, and two blocks fill the register file. Twice the rows would halve the reads of K and V from L2,
// but leave one block an SM, with nothing to run while it waits at a barrier.
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpThreads;
constexpr int kQueries = kWarps * kWarpRows;
// 64 keys: 32 would double the barriers, maxima and rescalings for each key; 128 do not fit the registers.
constexpr int kKeys = 64;
// Tiles in the ring: the one in use and two under way, the next of values and the next of keys. Two blocks of d = 128
// then take 162 KB, which still fits the 164 KB of sm_80 (and one block the 100 KB of sm_86, sm_89 and sm_120).
constexpr int kSlots = 3;
constexpr int kUnderWay = 1;  // of the two, while the first is waited for
// Rows whose squares a warp sums at a time, to have that many loads in flight.
constexpr int kRowsAtOnce = 4;
constexpr float kLog2E = 1.4426950408889634f;

// ---- shared memory

template <typename T, int kHeadDim>
struct AttentionShared {
  Tile<T, kQueries, kHeadDim> queries;  // normalized; each warp writes and reads its own rows, at the end its results
  Tile<T, kKeys, kHeadDim> ring[kSlots];
};
static_assert(sizeof(AttentionShared<uint16_t, 128>) == 80 * 1024);
static_assert(sizeof(AttentionShared<uint16_t, 64>) == 40 * 1024);

using Scores = float[kRowFragments][kKeys / kFragmentColumns][4];  // accumulators
using Weights = uint32_t[kKeys / kFragment][kRowFragments][4];     // left operands
template <int kHeadDim>
using Out = float[kRowFragments][kHeadDim / kFragmentColumns][4];  // accumulators

// ---- device helpers

// The first column of the block's head.
template <int kHeadDim>
ECHO_DEVICE int64_t head_column() {
  return static_cast<int64_t>(blockIdx.y) * kHeadDim;
}

// Starts the copy of one tile of keys or values, from key `first_key` on, and closes a group of copies even where there
// is no such key, so that waiting counts tiles. Rows past the last key become zeros: what they hold gets no weight, but
// must be finite for that.
template <typename T, int kHeadDim>
ECHO_DEVICE void start_copy(Tile<T, kKeys, kHeadDim>& tile, const void* source, int64_t row_stride, int first_key,
                            int keys) {
  constexpr int kChunks = kHeadDim / kChunk, kRowsApart = kThreads / kChunks;
  if (first_key < keys) {
    const int chunk = static_cast<int>(threadIdx.x) % kChunks, row = static_cast<int>(threadIdx.x) / kChunks;
    const int keys_left = keys - first_key - row;
    const T* from =
        static_cast<const T*>(source) + (first_key + row) * row_stride + head_column<kHeadDim>() + chunk * kChunk;
    T* to = tile.values + tile.offset(row, chunk);
#pragma unroll
    for (int i = 0; i < kKeys / kRowsApart; ++i) {
      copy_async_16(to + i * kRowsApart * kHeadDim, from + i * kRowsApart * row_stride, i * kRowsApart < keys_left);
    }
  }
  commit_copies();
}

// Normalizes the warp's rows of this head into shared memory. Rows past the last query repeat it: they are computed
// with, never written out.
template <typename T, int kHeadDim>
ECHO_DEVICE void normalize_queries(AttentionShared<T, kHeadDim>& shared, const MemoryAttentionParams& p,
                                   int64_t first_query, int warp_row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int dim = static_cast<int>(p.heads) * kHeadDim;
  const float per_dim = 1.0f / static_cast<float>(dim);
  const bool has_chunk = lane < kHeadDim / kChunk;
  const int64_t column_here = head_column<kHeadDim>() + lane * kChunk;
  float weight[kChunk] = {};
  if (has_chunk) load_floats(p.norm_q + column_here, weight);

  for (int row = warp_row; row < warp_row + kWarpRows; row += kRowsAtOnce) {
    const T* q[kRowsAtOnce];
    float squares[kRowsAtOnce] = {};
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const int64_t query = first_query + row + r;
      q[r] = static_cast<const T*>(p.q) + (query < p.queries ? query : p.queries - 1) * p.q_row_stride;
    }
#pragma unroll 3
    for (int column = lane * kChunk; column < dim; column += kWarpThreads * kChunk) {
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        float values[kChunk];
        Vec<T>::load(q[r] + column).to_floats(values);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) squares[r] = fmaf(values[i], values[i], squares[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const float factor = rsqrtf(fmaf(warp_sum(squares[r]), per_dim, p.eps));
      if (has_chunk) {
        float values[kChunk];
        Vec<T>::load(q[r] + column_here).to_floats(values);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) values[i] *= factor * weight[i];
        Vec<T>::from_floats(values).store(shared.queries.values + shared.queries.offset(row + r, lane));
      }
    }
  }
}

// scores += q k^T for the warp's rows and one tile of keys.
template <typename T, int kHeadDim>
ECHO_DEVICE void multiply_keys(Tile<T, kQueries, kHeadDim>& queries, Tile<T, kKeys, kHeadDim>& keys, int warp_row,
                               Scores& scores) {
#pragma unroll
  for (int depth = 0; depth < kHeadDim; depth += kFragment) {
    uint32_t q[kRowFragments][4];
#pragma unroll
    for (int m = 0; m < kRowFragments; ++m) load_left(queries, warp_row + m * kFragment, depth, q[m]);
#pragma unroll
    for (int key = 0; key < kKeys; key += 2 * kFragmentColumns) {
      uint32_t k[4];
      load_right_transposed(keys, key, depth, k);
      multiply_pair<T>(scores, q, k, key / kFragmentColumns);
    }
  }
}

// Rounds weights to the left operand of the product with the values. Accumulators lie just as that wants them: two
// fragments of 8 keys make one of 16.
template <typename T>
ECHO_DEVICE void round_weights(const Scores& weights, Weights& rounded) {
#pragma unroll
  for (int m = 0; m < kRowFragments; ++m) {
#pragma unroll
    for (int n = 0; n < kKeys / kFragmentColumns; ++n) {
      const float (&four)[4] = weights[m][n];
      rounded[n / 2][m][n % 2 * 2] = pack<T>(four[0], four[1]);
      rounded[n / 2][m][n % 2 * 2 + 1] = pack<T>(four[2], four[3]);
    }
  }
}

// out += weights v for the warp's rows and one tile of values.
template <typename T, int kHeadDim>
ECHO_DEVICE void multiply_values(const Weights& weights, Tile<T, kKeys, kHeadDim>& values, Out<kHeadDim>& out) {
#pragma unroll
  for (int key = 0; key < kKeys; key += kFragment) {
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 2 * kFragmentColumns) {
      uint32_t v[4];
      load_right(values, key, column, v);
      multiply_pair<T>(out, weights[key / kFragment], v, column / kFragmentColumns);
    }
  }
}

// What the products of a tile of which the first `count` keys exist are added to: keys past them end at -inf.
ECHO_DEVICE void start_scores(int count, Scores& scores) {
  const int column = static_cast<int>(threadIdx.x) % kQuad * 2;
#pragma unroll
  for (int n = 0; n < kKeys / kFragmentColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float start = n * kFragmentColumns + column + i % 2 < count ? 0.0f : -INFINITY;
#pragma unroll
      for (int m = 0; m < kRowFragments; ++m) scores[m][n][i] = start;
    }
  }
}

// Divides by the sums of the weights and writes, by way of the warp's own rows of shared memory: in the accumulators a
// lane has 4 bytes of a row, from there whole chunks go out.
template <typename T, int kHeadDim>
ECHO_DEVICE void write_out(Tile<T, kQueries, kHeadDim>& staging, const MemoryAttentionParams& p, int64_t first_query,
                           int warp_row, const SoftmaxState<kRowFragments>& softmax, const Out<kHeadDim>& out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
#pragma unroll
  for (int r = 0; r < 2 * kRowFragments; ++r) {
    const float normalizer = softmax.normalizer(r);
    const int row = warp_row + r * 8 + lane / kQuad, first = r % 2 * 2;
#pragma unroll
    for (int n = 0; n < kHeadDim / kFragmentColumns; ++n) {
      const float pair[2] = {out[r / 2][n][first] * normalizer, out[r / 2][n][first + 1] * normalizer};
      Vec<T, 2>::from_floats(pair).store(staging.values + staging.offset(row, n) + lane % kQuad * 2);
    }
  }
  __syncwarp();
  constexpr int kChunks = kHeadDim / kChunk;
  for (int i = lane; i < kWarpRows * kChunks; i += kWarpThreads) {
    const int row = warp_row + i / kChunks, chunk = i % kChunks;
    const int64_t query = first_query + row;
    if (query >= p.queries) break;
    T* target = static_cast<T*>(p.out) + query * p.out_row_stride + head_column<kHeadDim>() + chunk * kChunk;
    Vec<T>::load(staging.values + staging.offset(row, chunk)).store(target);
  }
}

// ---- kernel: grid (tiles of queries, heads), so that blocks that run together read the same keys and values

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) memory_attention_kernel(const MemoryAttentionParams p) {
  auto& shared = *dynamic_shared<AttentionShared<T, kHeadDim>>();
  const int64_t first_query = static_cast<int64_t>(blockIdx.x) * kQueries;
  const int warp_row = static_cast<int>(threadIdx.x) / kWarpThreads * kWarpRows;

  const int keys = static_cast<int>(p.keys);
  start_copy(shared.ring[0], p.k, p.k_row_stride, 0, keys);
  start_copy(shared.ring[1], p.v, p.v_row_stride, 0, keys);
  normalize_queries(shared, p, first_query, warp_row);

  const float scale = kLog2E / sqrtf(static_cast<float>(kHeadDim));
  SoftmaxState<kRowFragments> softmax;
  softmax.clear();
  Out<kHeadDim> out = {};

  int slot = 0;
  // Waits for the tile in `slot`, while the next one may still be under way. Behind the barrier it is there for all,
  // and all are done with the tile before it, whose slot takes the next copy: the source's next tile.
  const auto next_tile = [&](const void* source, int64_t row_stride, int first_key) -> Tile<T, kKeys, kHeadDim>& {
    wait_copies<kUnderWay>();
    __syncthreads();
    auto& tile = shared.ring[slot];
    start_copy(shared.ring[slot == 0 ? kSlots - 1 : slot - 1], source, row_stride, first_key + kKeys, keys);
    slot = slot == kSlots - 1 ? 0 : slot + 1;
    return tile;
  };

  for (int first_key = 0; first_key < keys; first_key += kKeys) {
    Scores scores;
    start_scores(keys - first_key, scores);
    multiply_keys(shared.queries, next_tile(p.k, p.k_row_stride, first_key), warp_row, scores);
    float correction[2 * kRowFragments];
    softmax.absorb(scores, scale, correction);
#pragma unroll
    for (int m = 0; m < kRowFragments; ++m) {
#pragma unroll
      for (int n = 0; n < kHeadDim / kFragmentColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] *= correction[2 * m + i / 2];
      }
    }
    Weights weights;
    round_weights<T>(scores, weights);
    multiply_values(weights, next_tile(p.v, p.v_row_stride, first_key), out);
  }
  write_out(shared.queries, p, first_query, warp_row, softmax, out);
}

// ---- launcher

template <typename T, int kHeadDim>
cudaError_t launch_for(const MemoryAttentionParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.queries + kQueries - 1) / kQueries), static_cast<unsigned>(p.heads));
  return launch(memory_attention_kernel<T, kHeadDim>, grid, dim3(kThreads), sizeof(AttentionShared<T, kHeadDim>),
                stream, p);
}

}  // namespace

cudaError_t launch_memory_attention(const MemoryAttentionParams& p, cudaStream_t stream) {
  constexpr int64_t kMaxKeys = INT32_MAX - 2 * kKeys;  // the kernel counts keys, a tile ahead too, in 32 bits
  if (p.queries < 0 || p.queries > static_cast<int64_t>(kQueries) * INT32_MAX || p.keys < 1 || p.keys > kMaxKeys ||
      p.heads < 1 || p.heads > 65535 || !rows_start_on_chunks(p.q, p.queries, p.q_row_stride) ||
      !rows_start_on_chunks(p.norm_q, 1, 0) || !rows_start_on_chunks(p.k, p.keys, p.k_row_stride) ||
      !rows_start_on_chunks(p.v, p.keys, p.v_row_stride) || !rows_start_on_chunks(p.out, p.queries, p.out_row_stride)) {
    return cudaErrorInvalidValue;
  }
  if (p.queries == 0) return cudaSuccess;
  return dispatch_16bit(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p.head_dim == 64) return launch_for<T, 64>(p, stream);
    if (p.head_dim == 128) return launch_for<T, 128>(p, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace echo
