// The video decoder's operations for torch.

#include "check.h"
#include "ops.h"
#include "vae/frames_to_uint8.h"
#include "vae/rms_silu_window.h"

namespace echo::bindings {

void rms_silu_window(const Tensor& x, const Tensor& gamma, const Tensor& window, int64_t past) {
  const Call call("rms_silu_window", {{"x", x}, {"gamma", gamma}, {"window", window}});
  const ScalarType dtype = call.floating({"x", x});
  call.dtype({"gamma", gamma}, at::kFloat);
  call.dtype({"window", window}, x.scalar_type());
  const auto [frames, height, width, channels] = call.sizes<4>({"x", x});
  call.shape({"gamma", gamma}, {channels});
  const auto [length, rows, columns, depth] = call.sizes<4>({"window", window});
  call.shape({"window", window}, {length, height, width, channels});
  call.require(past >= 0 && past + frames <= length, "past",
               "0.." + std::to_string(length - frames) + " for " + std::to_string(frames) + " frames in a window of " +
                   std::to_string(length),
               past);
  for (const Named& each : {Named("x", x), Named("gamma", gamma), Named("window", window)}) call.contiguous(each);
  const Tensor written = window.narrow(0, past, frames);
  RmsSiluWindowParams params;
  params.x = x.const_data_ptr();
  params.gamma = gamma.const_data_ptr<float>();
  params.window = written.mutable_data_ptr();
  params.dtype = dtype;
  params.pixels = frames * height * width;
  params.channels = channels;
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
