// A 3x3 convolution of a picture enlarged twofold by its nearest pixels, which is never made.

#pragma once

#include "vae/convolution.h"

namespace echo {

// out[t, 2y + a, 2x + b] = bias + residual[t, 2y + a, 2x + b]
//                          + sum over i, j of weight[2a + b, :, i, j] x[t, y + a - 1 + i, x + b - 1 + j]
// with a, b, i, j of 0 or 1, x zero outside of the picture. weight [4, out_channels, 2, 2, channels]; kernel_frames 1.
// Sizes, errors and speed as in causal_conv.h.
cudaError_t launch_upsample_conv(const ConvolutionParams& params, cudaStream_t stream);

}  // namespace echo
