// LayerNorm of the row that a block holds in registers, and its modulation; for the kernels of this folder.

#pragma once

#include "common/row_float8.cuh"

namespace echo {

struct LayerNormScratch {
  RowSums<1> sum;
  RowSums<1> squares;
};

// Centres the row and divides it by its deviation. Biased variance, in two passes over registers: the mean first, so
// that a large mean costs no digits.
template <class Shape>
ECHO_DEVICE void layer_norm(float (&values)[Shape::kShare], int dim, float eps, LayerNormScratch& scratch) {
  const float inverse_dim = 1.0f / static_cast<float>(dim);
  float sum[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < Shape::kShare; ++i) sum[0] += values[i];
  row_sums(sum, scratch.sum);
  const float mean = sum[0] * inverse_dim;

  float squares[1] = {0.0f};
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    const bool present = row_channel<Shape>(c) < dim;
#pragma unroll
    for (int i = c * Shape::kWidth; i < (c + 1) * Shape::kWidth; ++i) {
      values[i] = present ? values[i] - mean : 0.0f;
      squares[0] += values[i] * values[i];
    }
  }
  row_sums(squares, scratch.squares);
  const float inverse = rsqrtf(squares[0] * inverse_dim + eps);
#pragma unroll
  for (int i = 0; i < Shape::kShare; ++i) values[i] *= inverse;
}

// values · scale + shift, to row `token` of out [tokens, dim]: rounded to the element type, or to float8 with the row's
// scale in out_scale [tokens].
template <class Shape, bool kFloat8>
ECHO_DEVICE void store_modulated(float (&values)[Shape::kShare], const float* scale, const float* shift, int dim,
                                 void* out, float* out_scale, int64_t token) {
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    const int channel = row_channel<Shape>(c);
    if (channel >= dim) continue;
    float by[Shape::kWidth], plus[Shape::kWidth];
    Chunk<float, Shape::kWidth>::load(scale + channel).to_floats(by);
    Chunk<float, Shape::kWidth>::load(shift + channel).to_floats(plus);
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i) {
      values[c * Shape::kWidth + i] = values[c * Shape::kWidth + i] * by[i] + plus[i];
    }
    if constexpr (!kFloat8) {
      using T = typename Shape::Element;
      Chunk<T, Shape::kWidth> chunk;
      chunk.from_floats(values + c * Shape::kWidth);
      chunk.store(static_cast<T*>(out) + token * dim + channel);
    }
  }
  if constexpr (kFloat8) {
    ECHO_SHARED(RowMaximum, largest);
    quantize_row<Shape>(values, dim, largest, static_cast<uint8_t*>(out) + token * dim, out_scale + token);
  }
}

// Whether rows of T, and those that come out, are made of whole chunks.
template <class T, class Params>
bool norm_rows_fit(const Params& p) {
  const bool out = p.out_scale == nullptr ? vectors_fit<T>(p.out, p.dim) : float8_chunks_fit<T>(p.out, p.dim);
  return out && vectors_fit<T>(p.x, p.x_stride) && vectors_fit<float>(p.scale, p.dim) &&
         vectors_fit<float>(p.shift, p.dim);
}

}  // namespace echo
