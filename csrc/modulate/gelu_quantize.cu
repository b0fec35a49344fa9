// out, out_scale = float8 of GELU(x), x and out [tokens, dim]; GELU by its tanh formula, float32 inside.
//
// A block takes one row, which stays in registers between its one read and its one write: 8960 channels are 24 for each
// of 384 threads. The scale needs the whole row, so a GELU that writes its own result would cost one more pass over it.

#include "common/launch.h"
#include "common/row_float8.cuh"
#include "modulate/gelu_quantize.h"

namespace echo {
namespace {

// 0.5 · x · (1 + tanh(u)) is x / (1 + exp(-2u)): one exponential and one division. Its exponent in base 2 is a
// polynomial of x, u = sqrt(2/pi) · (x + 0.044715 · x^3), whose constants are multiplied here, not for every value.
ECHO_DEVICE float gelu(float x) {
  constexpr float kSlope = 0.7978845608028654f, kCubic = 0.044715f;  // sqrt(2/pi)
  constexpr float kLog2e = 1.4426950408889634f;
  constexpr float kLinear = -2.0f * kLog2e * kSlope;
  return __fdividef(x, 1.0f + exp2_approximate(x * (kLinear + kLinear * kCubic * (x * x))));
}

// For __launch_bounds__. A multiprocessor runs three blocks of 384 threads, 54 KB of rows on their way, where 56
// registers a thread suffice, but two with 64: the same 56 as for two blocks of 576, more threads than any row takes.
// Of float32 some architectures need more.
template <class Shape>
inline constexpr bool kThreeBlocks = Shape::kShare == kGeluShare && sizeof(typename Shape::Element) == 2;
template <class Shape>
inline constexpr int kMostThreads = kThreeBlocks<Shape> ? 3 * 384 / 2 : kMaxRowThreads;
template <class Shape>
inline constexpr int kBlocks = kThreeBlocks<Shape> ? 2 : kRowBlocks<Shape>;

template <class Shape>
__global__ void __launch_bounds__(kMostThreads<Shape>, kBlocks<Shape>) gelu_quantize_kernel(GeluQuantizeParams p) {
  using T = typename Shape::Element;
  ECHO_SHARED(RowMaximum, largest);
  const int dim = static_cast<int>(p.dim);
  const int64_t token = blockIdx.x;

  RowShare<Shape> row;
  row.load(static_cast<const T*>(p.x) + token * p.x_stride, dim);
  float values[Shape::kShare];
  row.to_floats(values);
#pragma unroll
  for (int i = 0; i < Shape::kShare; ++i) values[i] = gelu(values[i]);
  quantize_row<Shape>(values, dim, largest, static_cast<uint8_t*>(p.out) + token * p.dim, p.out_scale + token);
}

template <class T>
cudaError_t launch_as(const GeluQuantizeParams& p, cudaStream_t stream) {
  const bool whole = vectors_fit<T>(p.x, p.x_stride) && float8_chunks_fit<T>(p.out, p.dim);
  return with_row_shape<T, 1, kGeluShare>(p.dim, whole, [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(static_cast<unsigned>(p.tokens)), block(row_threads<Shape>(p.dim));
    return launch(gelu_quantize_kernel<Shape>, grid, block, 0, stream, p);
  });
}

}  // namespace

cudaError_t launch_gelu_quantize(const GeluQuantizeParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.dim == 0) return cudaSuccess;
  return dispatch(params.dtype, [&](auto tag) { return launch_as<typename decltype(tag)::type>(params, stream); });
}

}  // namespace echo
