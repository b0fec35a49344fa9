// Convolution over a window of past and new frames, with bias and residual.

#pragma once

#include "vae/convolution.h"

namespace echo {

// out[t, y, x] = bias + residual[t, y, x] + the sum over k, i, j of weight[:, k, i, j] x[t + k, y + i - r, x + j - r],
// where r = kernel_size / 2, and x is zero outside of the picture. weight [out_channels, kernel_frames, kernel_size,
// kernel_size, channels]; kernel_size 1 or 3. Any sizes; whole multiples of 8 channels on 16 bytes are fast.
// cudaErrorInvalidValue for a dtype or size that is none of the above, or more than 2^31 - 1 values in a frame or in
// the weight, or blocks in the grid. Nothing is launched then, nor where nothing comes out (cudaSuccess).
cudaError_t launch_causal_conv(const ConvolutionParams& params, int64_t kernel_size, cudaStream_t stream);

}  // namespace echo
