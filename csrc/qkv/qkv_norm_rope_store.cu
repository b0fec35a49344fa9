// From the QKV product qkv [tokens, 3 · dim] (q, k, v side by side), in one pass, dim = heads · head_dim:
//
//     q                                  = rotate(q / rms(q) · norm_q)
//     k_cache[write_index[i]]            = rotate(k / rms(k) · norm_k)      i: the last stored_tokens tokens
//     v_cache[write_index[i]]            = v
//     raw_k[write_index[i] - raw_offset] = k / rms(k) · norm_k              where raw_k is given
//
// rms runs over the whole width dim, not over a head. float32 inside, one rounding at the end, to the type of qkv, or
// for q and the caches to float8. Writing to the block's place in the ring is what evicts the frames that were there.
//
// A block takes one token: its row is read once and kept in registers; every output is written once.

#include "common/launch.h"
#include "common/row.cuh"
#include "common/row_float8.cuh"
#include "kv_ring/rotation.cuh"
#include "qkv/qkv_norm_rope_store.h"

namespace echo {
namespace {

// For __launch_bounds__: blocks of kMaxRowThreads. A thread holds parts of q, k and v and their turns at once, some 56
// registers: a multiprocessor runs six blocks of 192 threads (1536 channels), 54 KiB of rows on their way.
template <class Shape>
inline constexpr int kBlocks = Shape::kShare == kUsualShare && Shape::kWidth > 2 ? 2 : 1;

// The turns of this thread's channel pairs, the same for q and k.
template <class Shape>
ECHO_DEVICE void load_row_turns(const TokenTurns& here, int dim, int head_dim, Turn (&turns)[Shape::kShare / 2]) {
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    const int channel = row_channel<Shape>(c);
    if (channel >= dim) continue;
    const int pair = channel % head_dim / 2;
#pragma unroll
    for (int i = 0; i < Shape::kWidth / 2; ++i) turns[c * Shape::kWidth / 2 + i] = here[pair + i];
  }
}

template <class Shape>
ECHO_DEVICE float sum_of_squares(const RowShare<Shape>& row) {
  float values[Shape::kShare];
  row.to_floats(values);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < Shape::kShare; ++i) sum += values[i] * values[i];
  return sum;
}

// values = row · inverse_rms · weight
template <class Shape>
ECHO_DEVICE void scale_row(const RowShare<Shape>& row, float inverse_rms, const float* weight, int dim,
                           float (&values)[Shape::kShare]) {
  RowShare<Shape, float> weights;
  weights.load(weight, dim);
  float by[Shape::kShare];
  weights.to_floats(by);
  row.to_floats(values);
#pragma unroll
  for (int i = 0; i < Shape::kShare; ++i) values[i] = values[i] * inverse_rms * by[i];
}

// To the row of `to` that begins `begin` elements behind its start.
template <class Shape, bool kFloat8>
ECHO_DEVICE void store_row(const float (&values)[Shape::kShare], void* to, int64_t begin, int dim) {
  if constexpr (kFloat8) {
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int channel = row_channel<Shape>(c);
      if (channel >= dim) continue;
      store_float8<Shape::kWidth>(values + c * Shape::kWidth, static_cast<uint8_t*>(to) + begin + channel);
    }
  } else {
    RowShare<Shape> row;
    row.from_floats(values);
    row.store(static_cast<typename Shape::Element*>(to) + begin, dim);
  }
}

template <class Shape, bool kFloat8>
__global__ void __launch_bounds__(kMaxRowThreads, kBlocks<Shape>) qkv_norm_rope_store_kernel(QkvNormRopeStoreParams p) {
  using T = typename Shape::Element;
  ECHO_SHARED(RowSums<2>, scratch);
  const int head_dim = static_cast<int>(p.head_dim), dim = static_cast<int>(p.heads) * head_dim;
  const int64_t token = blockIdx.x;
  const int64_t stored = token - (p.tokens - p.stored_tokens);
  const T* source = static_cast<const T*>(p.qkv) + token * p.qkv_stride;

  // All that comes from memory sets out before anything is waited for.
  const int64_t slot = stored >= 0 ? p.write_index[stored] : 0;
  RowShare<Shape> q, k, v;
  q.load(source, dim);
  k.load(source + dim, dim);
  v.load(source + 2 * dim, stored >= 0 ? dim : 0);
  Turn turns[Shape::kShare / 2];
  load_row_turns<Shape>(rotation_tables(p, p.temporal).at(static_cast<int>(token)), dim, head_dim, turns);

  const float inverse_dim = 1.0f / static_cast<float>(dim);
  float squares[2] = {sum_of_squares(q), sum_of_squares(k)};
  float values[Shape::kShare];
  if constexpr (kFloat8) {
    v.to_floats(values);
    if (stored >= 0) store_row<Shape, true>(values, p.v_cache, slot * p.v_cache_stride, dim);
  } else {
    if (stored >= 0) v.store(static_cast<T*>(p.v_cache) + slot * p.v_cache_stride, dim);
  }
  row_sums(squares, scratch);

  scale_row(q, rsqrtf(squares[0] * inverse_dim + p.eps), p.norm_q, dim, values);
  rotate(values, turns);
  store_row<Shape, kFloat8>(values, p.q, token * dim, dim);

  if (stored < 0) return;
  scale_row(k, rsqrtf(squares[1] * inverse_dim + p.eps), p.norm_k, dim, values);
  if (p.raw_k != nullptr) {
    store_row<Shape, false>(values, p.raw_k, (slot - p.raw_offset) * p.raw_k_stride, dim);
  }
  rotate(values, turns);
  store_row<Shape, kFloat8>(values, p.k_cache, slot * p.k_cache_stride, dim);
}

template <class T>
cudaError_t launch_as(const QkvNormRopeStoreParams& p, cudaStream_t stream) {
  const int64_t dim = p.heads * p.head_dim;
  const auto fits = p.float8 ? float8_chunks_fit<T> : vectors_fit<T>;
  // Vectors may not straddle heads, so that a vector's pairs are neighbours in the tables too.
  const bool whole = vectors_fit<T>(p.qkv, p.qkv_stride) && fits(p.q, p.head_dim) &&
                     fits(p.k_cache, p.k_cache_stride) && fits(p.v_cache, p.v_cache_stride) &&
                     vectors_fit<T>(p.raw_k, p.raw_k_stride) && vectors_fit<float>(p.norm_q, 0) &&
                     vectors_fit<float>(p.norm_k, 0);
  return with_row_shape<T, 2>(dim, whole, [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(static_cast<unsigned>(p.tokens)), block(row_threads<Shape>(dim));
    const auto kernel = p.float8 ? qkv_norm_rope_store_kernel<Shape, true> : qkv_norm_rope_store_kernel<Shape, false>;
    return launch(kernel, grid, block, 0, stream, p);
  });
}

}  // namespace

cudaError_t launch_qkv_norm_rope_store(const QkvNormRopeStoreParams& params, cudaStream_t stream) {
  if (params.tokens == 0) return cudaSuccess;
  if (!turns_fit(params.temporal) || !turns_fit(params.spatial)) return cudaErrorInvalidValue;
  return dispatch(params.dtype, [&](auto tag) { return launch_as<typename decltype(tag)::type>(params, stream); });
}

}  // namespace echo
