// What the decoder's convolutions are told: see causal_conv.h and upsample_conv.h.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

// Channels-last throughout. A frame is dense; frames lie as far apart as their stride says, in elements.
struct ConvolutionParams {
  const void* x;         // [frames + kernel_frames - 1, height, width, channels]
  const void* weight;    // [(phases,) out_channels, kernel_frames, rows and columns of the kernel, channels], dense
  const float* bias;     // [out_channels]; null: none
  const void* residual;  // the shape of out; null: none. May be out itself, and else aliases nothing of it
  void* out;             // [frames, height, width, out_channels] times the enlargement (written); apart from x
  ScalarType dtype;      // of all but bias: kBFloat16 or kFloat16
  int64_t frames;        // that come out
  int64_t height;        // of x
  int64_t width;         // of x
  int64_t channels;
  int64_t out_channels;
  int64_t kernel_frames;
  int64_t x_frame_stride;
  int64_t residual_frame_stride;
  int64_t out_frame_stride;
};

}  // namespace echo
