// out = LayerNorm(x) · scale + shift, x and out [tokens, dim], scale and shift float32 [dim]; float32 inside. Rounded
// to x's type, or quantized to float8, token by token, from the float32 result.
//
// A block takes one row: x is read once, stays in registers through both sums, and is written once.

#include "common/launch.h"
#include "modulate/layer_norm.cuh"
#include "modulate/modulated_layer_norm.h"

namespace echo {
namespace {

template <class Shape, bool kFloat8>
__global__ void __launch_bounds__(kMaxRowThreads, kRowBlocks<Shape>)
    modulated_layer_norm_kernel(ModulatedLayerNormParams p) {
  using T = typename Shape::Element;
  ECHO_SHARED(LayerNormScratch, scratch);
  const int dim = static_cast<int>(p.dim);
  const int64_t token = blockIdx.x;

  RowShare<Shape> row;
  row.load(static_cast<const T*>(p.x) + token * p.x_stride, dim);
  float values[Shape::kShare];
  row.to_floats(values);
  layer_norm<Shape>(values, dim, p.eps, scratch);
  store_modulated<Shape, kFloat8>(values, p.scale, p.shift, dim, p.out, p.out_scale, token);
}

template <class T>
cudaError_t launch_as(const ModulatedLayerNormParams& p, cudaStream_t stream) {
  return with_row_shape<T, 1>(p.dim, norm_rows_fit<T>(p), [&](auto shape) {
    using Shape = decltype(shape);
    const auto kernel =
        p.out_scale == nullptr ? modulated_layer_norm_kernel<Shape, false> : modulated_layer_norm_kernel<Shape, true>;
    const dim3 grid(static_cast<unsigned>(p.tokens)), block(row_threads<Shape>(p.dim));
    return launch(kernel, grid, block, 0, stream, p);
  });
}

}  // namespace

cudaError_t launch_modulated_layer_norm(const ModulatedLayerNormParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.dim == 0) return cudaSuccess;
  return dispatch(params.dtype, [&](auto tag) { return launch_as<typename decltype(tag)::type>(params, stream); });
}

}  // namespace echo
