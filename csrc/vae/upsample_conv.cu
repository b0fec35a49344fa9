// The convolution behind a nearest-neighbour enlargement, without the enlargement: see upsample_conv.h for the formula
// and convolution.cuh for how it is computed.
//
// Of the 3x3 enlarged pixels that an output pixel sees, at most 2x2 are different: those of its phase, the parity of
// its row and column. With the weights summed by phase beforehand 4 taps of 9 are left.

#include "vae/convolution.cuh"
#include "vae/upsample_conv.h"

namespace echo {

cudaError_t launch_upsample_conv(const ConvolutionParams& params, cudaStream_t stream) {
  if (params.kernel_frames != 1) return cudaErrorInvalidValue;
  return convolution::launch_convolution<2, 2>(params, stream);
}

}  // namespace echo
