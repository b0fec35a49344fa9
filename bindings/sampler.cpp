// The sampler's operations for torch.

#include "check.h"
#include "ops.h"
#include "sampler/flow_step.h"

namespace echo::bindings {

void flow_step(const Tensor& x, const Tensor& flow, const Tensor& sigmas, const OptionalTensor& noise) {
  const Call call("flow_step", {{"x", x}, {"flow", flow}, {"sigmas", sigmas}, {"noise", noise}});
  call.dtype({"x", x}, at::kFloat);
  const ScalarType dtype = call.floating({"flow", flow});
  call.dtype({"sigmas", sigmas}, at::kDouble);
  call.dtype({"noise", noise}, at::kFloat);
  call.shape({"flow", flow}, x.sizes());
  call.shape({"sigmas", sigmas}, {2});
  call.shape({"noise", noise}, x.sizes());
  for (const Named& each : {Named("x", x), Named("flow", flow), Named("sigmas", sigmas), Named("noise", noise)}) {
    call.contiguous(each);
  }
  for (const Named& each : {Named("x", x), Named("flow", flow), Named("noise", noise)}) call.aligned(each);
  FlowStepParams params;
  params.x = x.mutable_data_ptr<float>();
  params.flow = flow.const_data_ptr();
  params.sigmas = sigmas.const_data_ptr<double>();
  params.noise = noise ? noise->const_data_ptr<float>() : nullptr;
  params.dtype = dtype;
  params.count = x.numel();
  if (params.count != 0) call.done(launch_flow_step(params, call.stream()));
}

}  // namespace echo::bindings
