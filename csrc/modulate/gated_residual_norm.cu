// x += gate · y (in place; no gate: 1), then out = LayerNorm(x) · scale + shift.
// x, y and out [tokens, dim]; gate, scale and shift float32 [dim]; float32 inside. What is normed is the sum as it was
// rounded into x. out is rounded to x's type, or quantized to float8, token by token, from the float32 result.
//
// A block takes one row: x and y are read once, x and out are written once; the norm runs on registers in between.

#include "common/launch.h"
#include "modulate/gated_residual_norm.h"
#include "modulate/layer_norm.cuh"

namespace echo {
namespace {

template <class Shape, bool kFloat8>
__global__ void __launch_bounds__(kMaxRowThreads, kRowBlocks<Shape>)
    gated_residual_norm_kernel(GatedResidualNormParams p) {
  using T = typename Shape::Element;
  ECHO_SHARED(LayerNormScratch, scratch);
  const int dim = static_cast<int>(p.dim);
  const int64_t token = blockIdx.x;
  T* x = static_cast<T*>(p.x) + token * p.x_stride;

  // All that comes from memory sets out before anything is waited for.
  RowShare<Shape> row, update;
  RowShare<Shape, float> gate;
  row.load(x, dim);
  update.load(static_cast<const T*>(p.y) + token * p.y_stride, dim);
  if (p.gate != nullptr) gate.load(p.gate, dim);
  float values[Shape::kShare], added[Shape::kShare];
  update.to_floats(added);
  if (p.gate != nullptr) {
    float by[Shape::kShare];
    gate.to_floats(by);
#pragma unroll
    for (int i = 0; i < Shape::kShare; ++i) added[i] *= by[i];
  }
  row.to_floats(values);
#pragma unroll
  for (int i = 0; i < Shape::kShare; ++i) values[i] += added[i];
  row.from_floats(values);
  row.store(x, dim);

  row.to_floats(values);
  layer_norm<Shape>(values, dim, p.eps, scratch);
  store_modulated<Shape, kFloat8>(values, p.scale, p.shift, dim, p.out, p.out_scale, token);
}

template <class T>
cudaError_t launch_as(const GatedResidualNormParams& p, cudaStream_t stream) {
  const bool whole = norm_rows_fit<T>(p) && vectors_fit<T>(p.y, p.y_stride) && vectors_fit<float>(p.gate, p.dim);
  return with_row_shape<T, 1>(p.dim, whole, [&](auto shape) {
    using Shape = decltype(shape);
    const auto kernel =
        p.out_scale == nullptr ? gated_residual_norm_kernel<Shape, false> : gated_residual_norm_kernel<Shape, true>;
    const dim3 grid(static_cast<unsigned>(p.tokens)), block(row_threads<Shape>(p.dim));
    return launch(kernel, grid, block, 0, stream, p);
  });
}

}  // namespace

cudaError_t launch_gated_residual_norm(const GatedResidualNormParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.dim == 0) return cudaSuccess;
  return dispatch(params.dtype, [&](auto tag) { return launch_as<typename decltype(tag)::type>(params, stream); });
}

}  // namespace echo
