#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

// out = softmax(RMSNorm(q) k^T / sqrt(d)) v, head by head; the norm runs over the whole width dim = heads * head_dim.
// No mask, no rotation. Strides are in elements, and every row starts on 16 bytes.
struct MemoryAttentionParams {
  const void* q;        // [queries, dim], rows q_row_stride apart
  const float* norm_q;  // [dim]
  const void* k;        // [keys, heads, head_dim], rows k_row_stride apart, a row of heads * head_dim dense
  const void* v;        // [keys, heads, head_dim], rows v_row_stride apart, a row of heads * head_dim dense
  void* out;            // [queries, dim] (written), rows out_row_stride apart; aliases nothing
  ScalarType dtype;     // of q, k, v and out: kBFloat16 or kFloat16
  int64_t queries;      // >= 0
  int64_t keys;         // >= 1: a softmax over nothing has no value
  int64_t heads;        // 1 .. 65535
  int64_t head_dim;     // 64 or 128
  int64_t q_row_stride;
  int64_t k_row_stride;
  int64_t v_row_stride;
  int64_t out_row_stride;
  float eps;
};

// cudaErrorInvalidValue for a dtype, size or stride that is none of the above, or anything that must start on 16 bytes
// and does not. Nothing is launched then, nor for zero queries (cudaSuccess).
cudaError_t launch_memory_attention(const MemoryAttentionParams& params, cudaStream_t stream);

}  // namespace echo
