// The video decoder's convolutions for torch.

#include "check.h"
#include "ops.h"
#include "vae/causal_conv.h"
#include "vae/causal_conv_hopper.h"
#include "vae/upsample_conv.h"

namespace echo::bindings {

namespace {

// Without bias and residual. x is a window or a picture to be enlarged, out has `frames` frames.
ConvolutionParams convolution_of(const Call& call, ScalarType dtype, Named x, const Tensor& weight, const Tensor& out,
                                 int64_t frames, int64_t out_channels, int64_t kernel_frames) {
  ConvolutionParams params = {};
  params.x_frame_stride = call.row_stride(x);
  params.out_frame_stride = call.row_stride({"out", out});
  params.x = x.tensor->const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.dtype = dtype;
  params.frames = frames;
  params.height = x.tensor->size(1);
  params.width = x.tensor->size(2);
  params.channels = x.tensor->size(3);
  params.out_channels = out_channels;
  params.kernel_frames = kernel_frames;
  return params;
}

}  // namespace

void causal_conv(const Tensor& window, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                 const Tensor& out) {
  const Call call("causal_conv",
                  {{"window", window}, {"weight", weight}, {"bias", bias}, {"residual", residual}, {"out", out}});
  const ScalarType dtype = call.half({"window", window});
  for (const Named& each : {Named("weight", weight), Named("residual", residual), Named("out", out)}) {
    call.dtype(each, window.scalar_type());
  }
  call.dtype({"bias", bias}, at::kFloat);
  const auto [length, height, width, channels] = call.sizes<4>({"window", window});
  const auto [out_channels, depth, kernel_frames, rows, columns] = call.sizes<5>({"weight", weight});
  call.shape({"weight", weight}, {out_channels, channels, kernel_frames, rows, columns});
  call.require(channels > 0, "window", "at least one channel", channels);
  call.require(kernel_frames > 0, "weight", "a kernel of at least one frame", kernel_frames);
  call.require(rows == 1 || rows == 3, "weight", "a kernel of 1 or 3 rows", rows);
  call.require(columns == rows, "weight", "as many columns as rows, " + std::to_string(rows), columns);
  const int64_t frames = length - kernel_frames + 1;
  call.require(frames >= 0, "window", "at least " + std::to_string(kernel_frames - 1) + " past frames", length);
  call.shape({"bias", bias}, {out_channels});
  call.shape({"residual", residual}, {frames, height, width, out_channels});
  call.shape({"out", out}, {frames, height, width, out_channels});
  ConvolutionParams params =
      convolution_of(call, dtype, {"window", window}, weight, out, frames, out_channels, kernel_frames);
  params.residual_frame_stride = call.row_stride({"residual", residual});
  call.channels_last({"weight", weight});
  call.contiguous({"bias", bias});
  call.disjoint({"out", out}, {{"window", window}});
  // Each of its values is read by the thread that then writes its place: out may be the residual, and nothing between.
  const bool in_place = residual.has_value() && residual->const_data_ptr() == out.const_data_ptr() &&
                        params.residual_frame_stride == params.out_frame_stride;
  if (residual.has_value() && !in_place) call.disjoint({"out", out}, {{"residual", residual}});
  params.bias = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  params.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
  if (out.numel() != 0) call.done(launch_causal_conv(params, rows, call.stream()));
}

void causal_conv_hopper(const Tensor& window, const Tensor& weight, const Tensor& out) {
  using namespace hopper;
  const Call call("causal_conv_hopper", {{"window", window}, {"weight", weight}, {"out", out}});
  int64_t capability = 0;
  call.done(compute_capability(capability));
  call.require(capability == kCapability, "window", "a GPU of compute capability " + std::to_string(kCapability),
               capability);
  const ScalarType dtype = call.half({"window", window});
  for (const Named& each : {Named("weight", weight), Named("out", out)}) call.dtype(each, window.scalar_type());
  const auto [length, height, width, channels] = call.sizes<4>({"window", window});
  const auto [tiles, kernel_frames, depths, taps, chunks, columns, values] = call.sizes<7>({"weight", weight});
  call.require(channels > 0 && channels % kDepth == 0, "window",
               "a multiple of " + std::to_string(kDepth) + " channels", channels);
  call.shape({"weight", weight}, {tiles, kernel_frames, channels / kDepth, kTaps, kDepth / kChunk, kColumns, kChunk});
  call.require(kernel_frames > 0, "weight", "a kernel of at least one frame", kernel_frames);
  const int64_t frames = length - kernel_frames + 1, out_channels = tiles * kColumns;
  call.require(frames >= 0, "window", "at least " + std::to_string(kernel_frames - 1) + " past frames", length);
  call.shape({"out", out}, {frames, height, width, out_channels});
  call.contiguous({"weight", weight});
  call.aligned({"weight", weight});
  for (const Named& each : {Named("window", window), Named("out", out)}) call.aligned_rows(each);
  call.disjoint({"out", out}, {{"window", window}});
  const ConvolutionParams params =
      convolution_of(call, dtype, {"window", window}, weight, out, frames, out_channels, kernel_frames);
  if (out.numel() == 0) return;
  // Of this call alone: zeroed in the order of the stream, by every replay of a graph too.
  const Tensor taken = window.new_zeros({1}, at::kInt);
  call.done(launch_causal_conv_hopper(params, taken.mutable_data_ptr<int>(), call.stream()));
}

void upsample_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& out) {
  const Call call("upsample_conv", {{"x", x}, {"weight", weight}, {"bias", bias}, {"out", out}});
  const ScalarType dtype = call.half({"x", x});
  for (const Named& each : {Named("weight", weight), Named("out", out)}) call.dtype(each, x.scalar_type());
  call.dtype({"bias", bias}, at::kFloat);
  const auto [frames, height, width, channels] = call.sizes<4>({"x", x});
  const auto [phases, out_channels, rows, columns, depth] = call.sizes<5>({"weight", weight});
  call.shape({"weight", weight}, {4, out_channels, 2, 2, channels});
  call.require(channels > 0, "x", "at least one channel", channels);
  call.shape({"bias", bias}, {out_channels});
  call.shape({"out", out}, {frames, 2 * height, 2 * width, out_channels});
  call.contiguous({"weight", weight});
  call.contiguous({"bias", bias});
  call.disjoint({"out", out}, {{"x", x}});
  ConvolutionParams params = convolution_of(call, dtype, {"x", x}, weight, out, frames, out_channels, 1);
  params.bias = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  if (out.numel() != 0) call.done(launch_upsample_conv(params, call.stream()));
}

}  // namespace echo::bindings
