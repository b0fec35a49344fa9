// The decoder's 3x3 convolutions on Hopper's own matrix products: causal_conv for the widths that it is cut for.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "vae/convolution.h"

namespace echo {
namespace hopper {

// A weight [out_channels, kernel_frames, 3, 3, channels] is cut into tiles of kColumns channels that come out, a frame
// of the kernel and kDepth channels that go in, each in the order in which shared memory holds it:
//   [out_channels / kColumns, kernel_frames, channels / kDepth, 9 taps, kDepth / 8, kColumns, 8]
inline constexpr int64_t kCapability = 90;  // 10 · major + minor
inline constexpr int64_t kColumns = 96, kDepth = 32, kTaps = 9, kChunk = 8;

// That of the current device, kCapability when emulated; 0 and an error where it cannot be asked.
cudaError_t compute_capability(int64_t& capability);

}  // namespace hopper

// out[t] = the sum over k of frames t + k of x with frame k of a kernel of kernel_frames x 3 x 3, zeros around x in
// space. weight as above; no bias, no residual. cudaErrorInvalidValue unless channels are a multiple of kDepth,
// out_channels of kColumns, and frames and weight start on 16 bytes; for compute capability 9.0 alone. `taken`, on the
// device, counts the tiles that blocks draw: 0 before, and no other launch's until this one has ended.
cudaError_t launch_causal_conv_hopper(const ConvolutionParams& params, int* taken, cudaStream_t stream);

}  // namespace echo
