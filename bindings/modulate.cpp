// The transformer's norms for torch, and its GELU where the result is quantized.

#include "check.h"
#include "modulate/gated_residual_norm.h"
#include "modulate/gelu_quantize.h"
#include "modulate/modulated_layer_norm.h"
#include "ops.h"

namespace echo::bindings {

namespace {

// The float8 rows `out [tokens, dim]` with a scale each, that an operation is given to write.
template <class Params>
void take_quantized(const Call& call, Params& params, const Tensor& out, const Tensor& out_scale) {
  call.shape({"out", out}, {params.tokens, params.dim});
  call.shape({"out_scale", out_scale}, {params.tokens});
  call.contiguous({"out", out});
  call.contiguous({"out_scale", out_scale});
  params.out = out.mutable_data_ptr();
  params.out_scale = out_scale.mutable_data_ptr<float>();
}

void check_quantized(const Call& call, const Tensor& out, const Tensor& out_scale) {
  call.dtype({"out", out}, at::kFloat8_e4m3fn);
  call.dtype({"out_scale", out_scale}, at::kFloat);
}

// All but what is written.
ModulatedLayerNormParams layer_norm_params(const Call& call, const Tensor& x, const Tensor& shift, const Tensor& scale,
                                           double eps) {
  ModulatedLayerNormParams params;
  params.dtype = call.floating({"x", x});
  call.dtype({"shift", shift}, at::kFloat);
  call.dtype({"scale", scale}, at::kFloat);
  const auto [tokens, dim] = call.sizes<2>({"x", x});
  call.shape({"shift", shift}, {dim});
  call.shape({"scale", scale}, {dim});
  params.x_stride = call.row_stride({"x", x});
  call.contiguous({"shift", shift});
  call.contiguous({"scale", scale});
  params.x = x.const_data_ptr();
  params.shift = shift.const_data_ptr<float>();
  params.scale = scale.const_data_ptr<float>();
  params.tokens = tokens;
  params.dim = dim;
  params.eps = static_cast<float>(eps);
  return params;
}

GatedResidualNormParams residual_norm_params(const Call& call, const Tensor& x, const Tensor& y,
                                             const OptionalTensor& gate, const Tensor& shift, const Tensor& scale,
                                             double eps) {
  GatedResidualNormParams params;
  params.dtype = call.floating({"x", x});
  call.dtype({"y", y}, x.scalar_type());
  const Named vectors[] = {{"gate", gate}, {"shift", shift}, {"scale", scale}};
  for (const Named& each : vectors) call.dtype(each, at::kFloat);
  const auto [tokens, dim] = call.sizes<2>({"x", x});
  call.shape({"y", y}, {tokens, dim});
  for (const Named& each : vectors) call.shape(each, {dim});
  params.x_stride = call.row_stride({"x", x});
  params.y_stride = call.row_stride({"y", y});
  for (const Named& each : vectors) call.contiguous(each);
  params.x = x.mutable_data_ptr();
  params.y = y.const_data_ptr();
  params.gate = gate ? gate->const_data_ptr<float>() : nullptr;
  params.shift = shift.const_data_ptr<float>();
  params.scale = scale.const_data_ptr<float>();
  params.tokens = tokens;
  params.dim = dim;
  params.eps = static_cast<float>(eps);
  return params;
}

}  // namespace

Tensor modulated_layer_norm(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const Call call("modulated_layer_norm", {{"x", x}, {"shift", shift}, {"scale", scale}});
  ModulatedLayerNormParams params = layer_norm_params(call, x, shift, scale, eps);
  const Tensor out = call.output(x, {params.tokens, params.dim});
  params.out = out.mutable_data_ptr();
  if (out.numel() != 0) call.done(launch_modulated_layer_norm(params, call.stream()), "x", params.dim);
  return out;
}

void modulated_layer_norm_quantize(const Tensor& x, const Tensor& shift, const Tensor& scale, const Tensor& out,
                                   const Tensor& out_scale, double eps) {
  const Call call("modulated_layer_norm_quantize",
                  {{"x", x}, {"shift", shift}, {"scale", scale}, {"out", out}, {"out_scale", out_scale}});
  check_quantized(call, out, out_scale);
  ModulatedLayerNormParams params = layer_norm_params(call, x, shift, scale, eps);
  take_quantized(call, params, out, out_scale);
  if (out.numel() != 0) call.done(launch_modulated_layer_norm(params, call.stream()), "x", params.dim);
}

Tensor gated_residual_norm(const Tensor& x, const Tensor& y, const OptionalTensor& gate, const Tensor& shift,
                           const Tensor& scale, double eps) {
  const Call call("gated_residual_norm", {{"x", x}, {"y", y}, {"gate", gate}, {"shift", shift}, {"scale", scale}});
  GatedResidualNormParams params = residual_norm_params(call, x, y, gate, shift, scale, eps);
  const Tensor out = call.output(x, {params.tokens, params.dim});
  params.out = out.mutable_data_ptr();
  if (out.numel() != 0) call.done(launch_gated_residual_norm(params, call.stream()), "x", params.dim);
  return out;
}

void gated_residual_norm_quantize(const Tensor& x, const Tensor& y, const OptionalTensor& gate, const Tensor& shift,
                                  const Tensor& scale, const Tensor& out, const Tensor& out_scale, double eps) {
  const Call call(
      "gated_residual_norm_quantize",
      {{"x", x}, {"y", y}, {"gate", gate}, {"shift", shift}, {"scale", scale}, {"out", out}, {"out_scale", out_scale}});
  check_quantized(call, out, out_scale);
  GatedResidualNormParams params = residual_norm_params(call, x, y, gate, shift, scale, eps);
  take_quantized(call, params, out, out_scale);
  if (out.numel() != 0) call.done(launch_gated_residual_norm(params, call.stream()), "x", params.dim);
}

void gelu_quantize(const Tensor& x, const Tensor& out, const Tensor& out_scale) {
  const Call call("gelu_quantize", {{"x", x}, {"out", out}, {"out_scale", out_scale}});
  GeluQuantizeParams params;
  params.dtype = call.floating({"x", x});
  check_quantized(call, out, out_scale);
  const auto [tokens, dim] = call.sizes<2>({"x", x});
  params.tokens = tokens;
  params.dim = dim;
  params.x_stride = call.row_stride({"x", x});
  params.x = x.const_data_ptr();
  take_quantized(call, params, out, out_scale);
  if (out.numel() != 0) call.done(launch_gelu_quantize(params, call.stream()), "x", dim, kWidestGeluRow);
}

}  // namespace echo::bindings
