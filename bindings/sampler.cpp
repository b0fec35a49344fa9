// The sampler's operations for torch.

#include <limits>

#include "check.h"
#include "ops.h"
#include "sampler/counter_noise.h"
#include "sampler/flow_step.h"

namespace echo::bindings {
void counter_noise(const Tensor& out, const Tensor& positions, const Tensor& seed, int64_t step) {
  const Call call("counter_noise", {{"out", out}, {"positions", positions}, {"seed", seed}});
  call.dtype({"out", out}, at::kFloat);
  call.dtype({"positions", positions}, at::kLong);
  call.dtype({"seed", seed}, at::kLong);
  call.shape({"positions", positions}, {kPositionFields});
  call.shape({"seed", seed}, {2});
  constexpr int64_t kLargestStep = std::numeric_limits<uint32_t>::max();
  call.require(step >= 0 && step <= kLargestStep, "step", "0.." + std::to_string(kLargestStep), step);
  for (const Named& each : {Named("out", out), Named("positions", positions), Named("seed", seed)}) {
    call.contiguous(each);
  }
  call.aligned({"out", out});
  CounterNoiseParams params;
  params.out = out.mutable_data_ptr<float>();
  params.block = positions.const_data_ptr<int64_t>() + kBlockField;
  params.seed = seed.const_data_ptr<int64_t>();
  params.step = static_cast<uint32_t>(step);
  params.count = out.numel();
  if (params.count != 0) call.done(launch_counter_noise(params, call.stream()));
}

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
