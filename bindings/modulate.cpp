// The transformer's norms for torch.

#include "check.h"
#include "modulate/gated_residual_norm.h"
#include "modulate/modulated_layer_norm.h"
#include "ops.h"

namespace echo::bindings {

Tensor modulated_layer_norm(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const Call call("modulated_layer_norm", {{"x", x}, {"shift", shift}, {"scale", scale}});
  const ScalarType dtype = call.floating({"x", x});
  call.dtype({"shift", shift}, at::kFloat);
  call.dtype({"scale", scale}, at::kFloat);
  const auto [tokens, dim] = call.sizes<2>({"x", x});
  call.shape({"shift", shift}, {dim});
  call.shape({"scale", scale}, {dim});
  ModulatedLayerNormParams params;
  params.x_stride = call.row_stride({"x", x});
  call.contiguous({"shift", shift});
  call.contiguous({"scale", scale});
  const Tensor out = call.output(x, {tokens, dim});
  params.x = x.const_data_ptr();
  params.shift = shift.const_data_ptr<float>();
  params.scale = scale.const_data_ptr<float>();
  params.out = out.mutable_data_ptr();
  params.dtype = dtype;
  params.tokens = tokens;
  params.dim = dim;
  params.eps = static_cast<float>(eps);
  if (out.numel() != 0) call.done(launch_modulated_layer_norm(params, call.stream()), "x", dim);
  return out;
}

Tensor gated_residual_norm(const Tensor& x, const Tensor& y, const OptionalTensor& gate, const Tensor& shift,
                           const Tensor& scale, double eps) {
  const Call call("gated_residual_norm", {{"x", x}, {"y", y}, {"gate", gate}, {"shift", shift}, {"scale", scale}});
  const ScalarType dtype = call.floating({"x", x});
  call.dtype({"y", y}, x.scalar_type());
  const Named vectors[] = {{"gate", gate}, {"shift", shift}, {"scale", scale}};
  for (const Named& each : vectors) call.dtype(each, at::kFloat);
  const auto [tokens, dim] = call.sizes<2>({"x", x});
  call.shape({"y", y}, {tokens, dim});
  for (const Named& each : vectors) call.shape(each, {dim});
  GatedResidualNormParams params;
  params.x_stride = call.row_stride({"x", x});
  params.y_stride = call.row_stride({"y", y});
  for (const Named& each : vectors) call.contiguous(each);
  const Tensor out = call.output(x, {tokens, dim});
  params.x = x.mutable_data_ptr();
  params.y = y.const_data_ptr();
  params.gate = gate ? gate->const_data_ptr<float>() : nullptr;
  params.shift = shift.const_data_ptr<float>();
  params.scale = scale.const_data_ptr<float>();
  params.out = out.mutable_data_ptr();
  params.dtype = dtype;
  params.tokens = tokens;
  params.dim = dim;
  params.eps = static_cast<float>(eps);
  if (out.numel() != 0) call.done(launch_gated_residual_norm(params, call.stream()), "x", dim);
  return out;
}

}  // namespace echo::bindings
