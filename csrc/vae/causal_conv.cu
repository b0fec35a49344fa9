// out = bias + residual + the convolution of a window, past frames and new ones: see causal_conv.h for the formula and
// convolution.cuh for how it is computed.

#include "vae/causal_conv.h"
#include "vae/convolution.cuh"

namespace echo {

cudaError_t launch_causal_conv(const ConvolutionParams& params, int64_t kernel_size, cudaStream_t stream) {
  if (kernel_size == 1) return convolution::launch_convolution<1>(params, stream);
  if (kernel_size == 3) return convolution::launch_convolution<3>(params, stream);
  return cudaErrorInvalidValue;
}

}  // namespace echo
