// Attention over all keys, from attention over pieces of them.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

inline constexpr int kFewestPieces = 2, kMostPieces = 4;

struct MergeAttentionParams {
  const void* outputs;      // [pieces, tokens, heads, head_dim]
  const float* logsumexps;  // [pieces, heads, tokens], natural logarithms
  void* out;                // [tokens, heads, head_dim], written
  ScalarType dtype;         // of outputs, out
  int64_t pieces;           // kFewestPieces .. kMostPieces
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t outputs_stride;  // elements from piece to piece
};

cudaError_t launch_merge_attention(const MergeAttentionParams& params, cudaStream_t stream);

}  // namespace echo
