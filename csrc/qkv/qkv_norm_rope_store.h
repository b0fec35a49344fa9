// From the QKV product to rotated queries and a filled cache slot, in one pass.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

// dim = heads · head_dim. The elements of a token's row are contiguous everywhere; strides are from token to token.
struct QkvNormRopeStoreParams {
  const void* qkv;             // [tokens, 3 · dim]: q, k, v
  const float* norm_q;         // [dim]
  const float* norm_k;         // [dim]
  const float* temporal;       // [tokens / tokens_per_frame, temporal_pairs, 2]: cosine, sine
  const float* spatial;        // [tokens_per_frame, spatial_pairs, 2]
  void* q;                     // [tokens, heads, head_dim], contiguous, written: normed, rotated
  void* k_cache;               // [any, heads, head_dim], rows write_index written: normed, rotated
  void* v_cache;               // [any, heads, head_dim], rows write_index written: as it came
  const int64_t* write_index;  // [stored_tokens]: where the last stored_tokens tokens go; no row twice
  void* raw_k;                 // [any, heads, head_dim], rows write_index - raw_offset written: normed; or null
  ScalarType dtype;            // of qkv and raw_k, and of q, k_cache and v_cache unless those are
  bool float8;                 // e4m3, without a scale: beyond 448 it is 448
  int64_t tokens;
  int64_t stored_tokens;  // <= tokens
  int64_t heads;
  int64_t head_dim;  // 2 · (temporal_pairs + spatial_pairs)
  int64_t tokens_per_frame;
  int64_t temporal_pairs;
  int64_t spatial_pairs;
  int64_t qkv_stride;      // elements, >= 3 · dim
  int64_t k_cache_stride;  // elements, >= dim; so the next two
  int64_t v_cache_stride;
  int64_t raw_k_stride;
  int64_t raw_offset;
  float eps;
};

// cudaErrorInvalidValue for dim > 8192 (4096 where a head or a row is not made of aligned 16-byte pieces) and for angle
// tables that do not start on 8 bytes.
cudaError_t launch_qkv_norm_rope_store(const QkvNormRopeStoreParams& params, cudaStream_t stream);

}  // namespace echo
