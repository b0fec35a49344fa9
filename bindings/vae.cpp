// The video decoder's operations for torch.

#include "check.h"
#include "ops.h"
#include "vae/frames_to_uint8.h"
#include "vae/rms_silu_window.h"

namespace echo::bindings {

void rms_silu_window(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& residual, const Tensor& gamma,
                     const Tensor& window, const OptionalTensor& history, bool keep) {
  const Named inputs[] = {{"x", x}, {"residual", residual}, {"window", window}, {"history", history}};
  const Call call("rms_silu_window", {inputs[0], {"bias", bias}, inputs[1], {"gamma", gamma}, inputs[2], inputs[3]});
  const ScalarType dtype = call.floating(inputs[0]);
  for (const Named& each : inputs) call.dtype(each, x.scalar_type());
  const auto [frames, height, width, channels] = call.sizes<4>(inputs[0]);
  for (const Named& each : {Named("bias", bias), Named("gamma", gamma)}) {
    call.dtype(each, at::kFloat);
    call.shape(each, {channels});
    call.contiguous(each);
  }
  call.shape(inputs[1], x.sizes());
  const auto [length, rows, columns, depth] = call.sizes<4>(inputs[2]);
  call.require(length >= frames, "window", "at least the " + std::to_string(frames) + " frames of x", length);
  call.shape(inputs[2], {length, height, width, channels});
  const int64_t past = length - frames;
  call.shape(inputs[3], {past, height, width, channels});
  for (const Named& each : inputs) call.contiguous(each);
  call.disjoint(inputs[2], {inputs[0]});
  if (history.has_value()) call.disjoint(inputs[3], {inputs[0], inputs[2]});
  if (residual.has_value()) call.disjoint(inputs[2], {inputs[1]});
  if (residual.has_value() && history.has_value()) call.disjoint(inputs[3], {inputs[1]});
  RmsSiluWindowParams params;
  params.x = x.mutable_data_ptr();
  params.bias = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  params.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  params.gamma = gamma.const_data_ptr<float>();
  params.window = window.mutable_data_ptr();
  params.history = history.has_value() ? history->mutable_data_ptr() : nullptr;
  params.dtype = dtype;
  params.frames = frames;
  params.frame_pixels = height * width;
  params.channels = channels;
  params.past = past;
  params.keep = keep;
  if (x.numel() != 0) call.done(launch_rms_silu_window(params, call.stream()));
}

void frames_to_uint8(const Tensor& video, const Tensor& out) {
  const Call call("frames_to_uint8", {{"video", video}, {"out", out}});
  const ScalarType dtype = call.floating({"video", video});
  call.dtype({"out", out}, at::kByte);
  call.shape({"out", out}, video.sizes());
  for (const Named& each : {Named("video", video), Named("out", out)}) {
    call.contiguous(each);
    call.aligned(each);
  }
  FramesToUint8Params params;
  params.video = video.const_data_ptr();
  params.out = out.mutable_data_ptr<uint8_t>();
  params.dtype = dtype;
  params.count = video.numel();
  if (params.count != 0) call.done(launch_frames_to_uint8(params, call.stream()));
}

}  // namespace echo::bindings
