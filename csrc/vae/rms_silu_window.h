// What lies between two convolutions of the VAE: bias, residual, channel norm and SiLU, into the next one's window.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

struct RmsSiluWindowParams {
  void* x;               // [frames · frame_pixels, channels], contiguous: channels-last pixels; written where keep
  const float* bias;     // [channels], or null
  const void* residual;  // like x, or null
  const float* gamma;    // [channels]
  void* window;          // [(past + frames) · frame_pixels, channels], contiguous, written
  void* history;         // [past · frame_pixels, channels], contiguous, written; null: the window has its past already
  ScalarType dtype;      // of x, residual, window, history
  int64_t frames;
  int64_t frame_pixels;  // height · width
  int64_t channels;
  int64_t past;
  bool keep;  // x becomes x + bias + residual
};

// Any number of channels; up to 1024 a pixel is read once.
cudaError_t launch_rms_silu_window(const RmsSiluWindowParams& params, cudaStream_t stream);

}  // namespace echo
