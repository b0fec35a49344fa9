// The row that a block holds in registers, quantized to float8: one scale for the row, from its largest magnitude.
// echo_rt/ops/float8.py is the definition, step by step the same.

#pragma once

#include <cstdint>
#include <cstring>

#include "common/float8.h"
#include "common/ptx.cuh"
#include "common/row.cuh"

namespace echo {

// What a row's largest magnitude counts as at least: 2^-100, so that neither a row of zeros nor its scale's reciprocal
// leaves float32's normal numbers.
inline constexpr uint32_t kLeastMaximumBits = (127u - 100u) << 23;
inline constexpr float kScaleOfMaximum = 1.0f / kFloat8Max;

struct RowMaximum {
  uint32_t partial[kMaxRowWarps];
};

// Largest of all threads' bits, in every thread. One barrier; `scratch` is free again behind another one.
ECHO_DEVICE uint32_t row_maximum(uint32_t bits, RowMaximum& scratch) {
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int warps = blockDim.x / kWarpThreads, part = lane % kMaxRowWarps;
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    bits = max(bits, __shfl_xor_sync(kAllLanes, bits, distance));
  }
  if (lane == 0) scratch.partial[warp] = bits;
  __syncthreads();
  bits = part < warps ? scratch.partial[part] : 0;
#pragma unroll
  for (int distance = kMaxRowWarps / 2; distance > 0; distance /= 2) {
    bits = max(bits, __shfl_xor_sync(kAllLanes, bits, distance));
  }
  return bits;
}

// Can a row of float8 be written in the chunks that rows of T are held in?
template <class T>
bool float8_chunks_fit(const void* out, int64_t dim) {
  constexpr int kChunk = kVectorBytes / static_cast<int>(sizeof(T));
  return reinterpret_cast<uintptr_t>(out) % kChunk == 0 && dim % kChunk == 0;
}

// kCount neighbours as float8, in one store where they fill a word.
template <int kCount>
ECHO_DEVICE void store_float8(const float* values, uint8_t* address) {
  if constexpr (kCount % 4 == 0) {
    Vec<uint32_t, kCount / 4> words;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      words[i] = pack_float8(values[4 * i], values[4 * i + 1]) | pack_float8(values[4 * i + 2], values[4 * i + 3])
                                                                     << 16;
    }
    words.store(reinterpret_cast<uint32_t*>(address));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) address[i] = static_cast<uint8_t>(pack_float8(values[i], 0.0f));
  }
}

// Writes the row `values`, zero past its end, to out [dim] and its scale. The bits of magnitudes are ordered as they
// are, infinity and then NaN above them all: a NaN anywhere in the row is the row's scale.
template <class Shape>
ECHO_DEVICE void quantize_row(float (&values)[Shape::kShare], int dim, RowMaximum& scratch, uint8_t* out,
                              float* scale) {
  uint32_t largest = kLeastMaximumBits;
#pragma unroll
  for (int i = 0; i < Shape::kShare; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7FFFFFFFu);
  const float row_scale = __uint_as_float(row_maximum(largest, scratch)) * kScaleOfMaximum;
  const float inverse = __frcp_rn(row_scale);
  if (threadIdx.x == 0) *scale = row_scale;
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    const int channel = row_channel<Shape>(c);
    if (channel >= dim) continue;
#pragma unroll
    for (int i = c * Shape::kWidth; i < (c + 1) * Shape::kWidth; ++i) values[i] *= inverse;
    store_float8<Shape::kWidth>(values + c * Shape::kWidth, out + channel);
  }
}

}  // namespace echo
