// window[i] = silu(x[i] / max(|x[i]|, 1e-12) · sqrt(channels) · gamma), for every pixel i; |.| over the channels.
// x [pixels, channels] and window [at least pixels, channels] channels-last, gamma float32 [channels]; float32 inside.
//
// `lanes` neighbouring lanes of a warp take a pixel, so a warp takes 32 / lanes of them and no barrier is needed. A
// pixel is read once, kept in registers and written once; gamma comes from the first-level cache.

#include <cmath>

#include "common/chunk.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "vae/rms_silu_window.h"

namespace echo {
namespace {

// 64 pixels of 96 channels, 12 KiB. A multiprocessor runs five such blocks at once (48 registers a thread), 60 KiB of
// pixels on their way. Reckoned, not measured: no GPU has run this yet.
constexpr int kThreads = 256;
constexpr int64_t kMaxHeldChannels = 1024;  // what a warp keeps of a pixel in registers
constexpr float kMaxInverseNorm = 1e12f;

// How a pixel is spread: each of `lanes` (a power of two, at most a warp) holds kChunks chunks of kWidth channels.
template <class T, int kWidth_, int kChunks_>
struct PixelShape {
  using Element = T;
  static constexpr int kWidth = kWidth_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kShare = kWidth * kChunks;
};

// The fewest lanes that hold all channels. More than a warp says that the shape does not fit.
template <class Shape>
constexpr int pixel_lanes(int64_t channels) {
  int lanes = 1;
  while (lanes * Shape::kShare < channels) lanes *= 2;
  return lanes;
}

// x / (1 + e^-x). For 16-bit results in approximations, good to some 1e-6: half a dozen instructions where exact ones
// take thirty, for each of billions of values of a block.
template <class T>
ECHO_DEVICE float silu(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x / (1.0f + expf(-x));
  } else {
    constexpr float kLog2E = 1.44269504f;
    return __fdividef(x, 1.0f + exp2_approximate(-kLog2E * x));
  }
}

ECHO_DEVICE float inverse_norm(float squares) { return fminf(rsqrtf(squares), kMaxInverseNorm); }

// The chunks of this lane: lane, lane + lanes, ... so that neighbouring lanes touch neighbouring chunks.
template <class Shape>
ECHO_DEVICE int pixel_channel(int chunk) {
  return (chunk * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * Shape::kWidth;
}

template <class Shape>
__global__ void __launch_bounds__(kThreads) rms_silu_window_kernel(RmsSiluWindowParams p, float root_channels) {
  using T = typename Shape::Element;
  const int lanes = blockDim.x, channels = static_cast<int>(p.channels);
  // A lane past the last pixel goes with the last one, as all of a warp must meet in the sums; it stores nothing.
  const int64_t own = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, pixel = own < p.pixels ? own : p.pixels - 1;
  const T* const x = static_cast<const T*>(p.x) + pixel * channels;
  T* const out = static_cast<T*>(p.window) + pixel * channels;

  float values[Shape::kShare], squares = 0.0f;
#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    // Past the last channel, the first ones stand in and do not count.
    const int channel = pixel_channel<Shape>(c);
    const bool present = channel < channels;
    float* const part = values + c * Shape::kWidth;
    Chunk<T, Shape::kWidth>::load(x + (present ? channel : 0)).to_floats(part);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i) sum += part[i] * part[i];
    squares += present ? sum : 0.0f;
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(kAllLanes, squares, distance);
  }
  const float scale = inverse_norm(squares) * root_channels;

#pragma unroll
  for (int c = 0; c < Shape::kChunks; ++c) {
    const int channel = pixel_channel<Shape>(c);
    if (own >= p.pixels || channel >= channels) continue;
    float gamma[Shape::kWidth];
    Chunk<float, Shape::kWidth>::load(p.gamma + channel).to_floats(gamma);
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i) gamma[i] = silu<T>(values[c * Shape::kWidth + i] * scale * gamma[i]);
    Chunk<T, Shape::kWidth> chunk;
    chunk.from_floats(gamma);
    chunk.store(out + channel);
  }
}

// A warp a pixel of any width, which is read twice, as registers would not hold it. No released model has such.
template <class T>
__global__ void __launch_bounds__(kThreads) wide_rms_silu_window_kernel(RmsSiluWindowParams p, float root_channels) {
  const int64_t pixel = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (pixel >= p.pixels) return;  // a whole warp or none
  const T* const x = static_cast<const T*>(p.x) + pixel * p.channels;
  T* const out = static_cast<T*>(p.window) + pixel * p.channels;
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < p.channels; i += kWarpThreads) squares += to_float(x[i]) * to_float(x[i]);
  const float scale = inverse_norm(warp_sum(squares)) * root_channels;
  for (int64_t i = threadIdx.x; i < p.channels; i += kWarpThreads) {
    out[i] = from_float<T>(silu<T>(to_float(x[i]) * scale * p.gamma[i]));
  }
}

// A block of `lanes` threads for each of its pixels.
template <class Kernel>
cudaError_t launch_pixels(Kernel kernel, int lanes, const RmsSiluWindowParams& p, cudaStream_t stream) {
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(kThreads / lanes));
  const dim3 grid(static_cast<unsigned>((p.pixels + block.y - 1) / block.y));
  return launch(kernel, grid, block, 0, stream, p, std::sqrt(static_cast<float>(p.channels)));
}

template <class Shape>
cudaError_t launch_as(const RmsSiluWindowParams& p, cudaStream_t stream) {
  return launch_pixels(rms_silu_window_kernel<Shape>, pixel_lanes<Shape>(p.channels), p, stream);
}

// The shape that leaves the fewest lanes idle; of equals the one with fewer chunks. Three chunks fit the Wan decoder,
// whose levels have 96, 192 and 384 channels: 4, 8 and 16 lanes of 3 · 8 channels, none idle.
template <class T>
cudaError_t launch_whole(const RmsSiluWindowParams& p, cudaStream_t stream) {
  constexpr int kWhole = kVectorBytes / static_cast<int>(sizeof(T));
  using One = PixelShape<T, kWhole, 1>;
  using Three = PixelShape<T, kWhole, 3>;
  using Eight = PixelShape<T, kWhole, 8>;
  static_assert(kWarpThreads * Eight::kShare >= kMaxHeldChannels, "one warp takes a pixel");
  const int one = pixel_lanes<One>(p.channels), three = pixel_lanes<Three>(p.channels);
  if (one <= kWarpThreads && one * One::kShare <= three * Three::kShare) return launch_as<One>(p, stream);
  if (three <= kWarpThreads) return launch_as<Three>(p, stream);
  return launch_as<Eight>(p, stream);
}

}  // namespace

cudaError_t launch_rms_silu_window(const RmsSiluWindowParams& params, cudaStream_t stream) {
  if (params.pixels == 0 || params.channels == 0) return cudaSuccess;
  return dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.channels > kMaxHeldChannels) {
      return launch_pixels(wide_rms_silu_window_kernel<T>, kWarpThreads, params, stream);
    }
    const bool whole = vectors_fit<T>(params.x, params.channels) && vectors_fit<T>(params.window, params.channels) &&
                       vectors_fit<float>(params.gamma, params.channels);
    if (whole) return launch_whole<T>(params, stream);
    using Narrow = PixelShape<T, 1, 2>;
    return pixel_lanes<Narrow>(params.channels) <= kWarpThreads ? launch_as<Narrow>(params, stream)
                                                                : launch_as<PixelShape<T, 1, 32>>(params, stream);
  });
}

}  // namespace echo
