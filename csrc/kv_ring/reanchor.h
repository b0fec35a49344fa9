// Turns the sink and memory keys from their unrotated copies to where the shift puts them, in all layers at once.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

// Rows of kv: memory [0, memory_tokens), sink [memory_tokens, memory_tokens + sink_tokens), ring. A row has
// heads · head_dim elements side by side. What is null stays as it is in kv.
struct ReanchorParams {
  void* kv;  // [layers, 2, rows, heads, head_dim], contiguous, written
  const float*
      temporal_anchor;   // [memory_tokens / tokens_per_frame + sink_tokens / tokens_per_frame, temporal_pairs, 2]
  const float* spatial;  // [tokens_per_frame, spatial_pairs, 2]
  const void* sink_k;    // [layers, sink_tokens, heads, head_dim], contiguous, or null
  const void* memory_k;  // [memory_tokens, heads, head_dim], contiguous, or null
  const void* memory_v;  // [memory_tokens, heads, head_dim], contiguous, or null
  ScalarType dtype;      // of sink_k, memory_k, memory_v, and of kv unless that is
  bool float8;           // e4m3, without a scale: beyond 448 it is 448
  int64_t layers;
  int64_t rows;
  int64_t heads;
  int64_t head_dim;  // 2 · (temporal_pairs + spatial_pairs)
  int64_t memory_tokens;
  int64_t sink_tokens;  // 0 where sink_k is null
  int64_t tokens_per_frame;
  int64_t temporal_pairs;
  int64_t spatial_pairs;
};

// cudaErrorInvalidValue for angle tables that do not start on 8 bytes.
cudaError_t launch_reanchor(const ReanchorParams& params, cudaStream_t stream);

}  // namespace echo
