// The VAE's channel norm and SiLU, written behind the past frames of the next convolution's window.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

struct RmsSiluWindowParams {
  const void* x;       // [frames · height · width, channels], contiguous: channels-last pixels
  const float* gamma;  // [channels]
  void* window;        // [at least pixels, channels], contiguous, written: starts at the first NEW frame of the window
  ScalarType dtype;    // of x, window
  int64_t pixels;      // frames · height · width
  int64_t channels;
};

// Any number of channels; up to 1024 a pixel is read once.
cudaError_t launch_rms_silu_window(const RmsSiluWindowParams& params, cudaStream_t stream);

}  // namespace echo
