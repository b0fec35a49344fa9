// window[past + i] = silu(v[i] / max(|v[i]|, 1e-12) · sqrt(channels) · gamma), for every pixel i; |.| over the
// channels; v = x + bias + residual, rounded to the dtype, and kept in x where that is asked for. All tensors
// channels-last, bias and gamma float32 [channels]; float32 inside.
//
// The window is shared by many convolutions, what one of them remembers is its history: the remembered frames go to the
// front of the window, and the last frames of the window become the history, in the same pass.
//
// `lanes` neighbouring lanes of a warp take a pixel, so a warp takes 32 / lanes of them and no barrier is needed. A
// pixel is read once, kept in registers and written once; gamma and bias come from the first-level cache.

#include <cmath>

#include "common/chunk.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "vae/rms_silu_window.h"

namespace echo {
namespace {

// 64 pixels of 96 channels, 12 KiB. A multiprocessor runs four such blocks at once (64 registers a thread), 48 KiB of
// pixels on their way, and as much of residuals. Reckoned, not measured: no GPU has run this yet.
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
  static constexpr int kBatch = kChunks % 4 == 0 ? 4 : kChunks;  // chunks that are on their way at once
};

// For __launch_bounds__: blocks of a multiprocessor, or 0 for what the compiler thinks best. Three chunks of float32 it
// would fit into registers for five blocks, and spill.
template <class Shape>
inline constexpr int kBlocks = sizeof(typename Shape::Element) == sizeof(float) && Shape::kChunks == 3 ? 4 : 0;

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
    // Two units in the last place. An exact division has a path that is a call, and registers would be spilled around
    // it.
    return __fdividef(x, 1.0f + expf(-x));
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

// Where a pixel lies. The grid's rows are the frames, so that none of it takes a division.
struct Place {
  int frame;       // of x
  int64_t within;  // the frame
  int64_t pixel;   // of x
};

ECHO_DEVICE Place place_of(int64_t within, const RmsSiluWindowParams& p) {
  const int frame = static_cast<int>(blockIdx.y);
  return {frame, within, frame * p.frame_pixels + within};
}

// Makes `values`, the window's new ones at `place` and `channels`, the past's too. Of the frames at this place, each
// thread moves those that are a whole number of steps of `frames` before its own: each is read before it is
// overwritten, and no other thread touches it, however many frames are new. All chunks of a frame are under way before
// one is waited for. A chunk at or past p.channels is none.
template <class T, class Value, int kChunks>
ECHO_DEVICE void move_past(const Value (&values)[kChunks], const int (&channels)[kChunks], const Place& place,
                           const RmsSiluWindowParams& p) {
  if (p.history == nullptr) return;
  const int past = static_cast<int>(p.past), frames = static_cast<int>(p.frames);
  const int end = static_cast<int>(p.channels);
  const auto load = [&](Value(&into)[kChunks], const T* from) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (channels[c] < end) into[c] = Value::load(from + channels[c]);
    }
  };
  const auto store = [&](const Value(&all)[kChunks], T* to) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (channels[c] < end) all[c].store(to + channels[c]);
    }
  };
  for (int frame = (past + place.frame) % frames; frame < past; frame += frames) {
    const int64_t here = (frame * p.frame_pixels + place.within) * p.channels;
    T* const remembered = static_cast<T*>(p.history) + here;
    Value moved[kChunks];
    load(moved, remembered);
    store(moved, static_cast<T*>(p.window) + here);
    if (frame + frames < past) {
      load(moved, remembered + p.frames * p.frame_pixels * p.channels);
      store(moved, remembered);
    } else {
      store(values, remembered);
    }
  }
}

// x + bias + residual of one chunk, as floats, after it was rounded as it is kept. `residual` counts where there is
// one.
template <class Value, int kWidth>
ECHO_DEVICE void sum_terms(Value value, const Value& residual, float* floats, int channel,
                           const RmsSiluWindowParams& p) {
  value.to_floats(floats);
  if (p.bias == nullptr && p.residual == nullptr) return;
  float term[kWidth];
  if (p.bias != nullptr) {
    Chunk<float, kWidth>::load(p.bias + channel).to_floats(term);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) floats[i] += term[i];
  }
  if (p.residual != nullptr) {
    residual.to_floats(term);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) floats[i] += term[i];
  }
  value.from_floats(floats);
  value.to_floats(floats);
}

template <class Shape>
__global__ void __launch_bounds__(kThreads, kBlocks<Shape>)
    rms_silu_window_kernel(RmsSiluWindowParams p, float root_channels) {
  using T = typename Shape::Element;
  using Value = Chunk<T, Shape::kWidth>;
  const int lanes = blockDim.x, channels = static_cast<int>(p.channels);
  // A lane past the frame's last pixel goes with that, as all of a warp must meet in the sums; it stores nothing.
  const int64_t own = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const Place place = place_of(own < p.frame_pixels ? own : p.frame_pixels - 1, p);
  T* const x = static_cast<T*>(p.x) + place.pixel * channels;
  T* const out = static_cast<T*>(p.window) + (p.past * p.frame_pixels + place.pixel) * channels;

  const auto channel_of = [](int c) { return pixel_channel<Shape>(c); };
  // Past the last channel, the first ones stand in and do not count.
  const auto from = [&](int c) { return channel_of(c) < channels ? channel_of(c) : 0; };

  // Of a batch, all that comes from memory sets out before anything is waited for.
  float values[Shape::kShare], squares = 0.0f;
#pragma unroll
  for (int first = 0; first < Shape::kChunks; first += Shape::kBatch) {
    Value terms[Shape::kBatch], residual[Shape::kBatch];
#pragma unroll
    for (int i = 0; i < Shape::kBatch; ++i) terms[i] = Value::load(x + from(first + i));
    if (p.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < Shape::kBatch; ++i) {
        residual[i] = Value::load(static_cast<const T*>(p.residual) + place.pixel * channels + from(first + i));
      }
    }
#pragma unroll
    for (int i = 0; i < Shape::kBatch; ++i) {
      float* const part = values + (first + i) * Shape::kWidth;
      sum_terms<Value, Shape::kWidth>(terms[i], residual[i], part, from(first + i), p);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < Shape::kWidth; ++j) sum += part[j] * part[j];
      squares += channel_of(first + i) < channels ? sum : 0.0f;
    }
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(kAllLanes, squares, distance);
  }
  const float scale = inverse_norm(squares) * root_channels;

  if (own >= p.frame_pixels) return;  // no lane waits for another from here on
#pragma unroll
  for (int first = 0; first < Shape::kChunks; first += Shape::kBatch) {
    Value results[Shape::kBatch];
    int channel[Shape::kBatch];
#pragma unroll
    for (int i = 0; i < Shape::kBatch; ++i) {
      channel[i] = channel_of(first + i);
      if (channel[i] >= channels) continue;
      const float* const part = values + (first + i) * Shape::kWidth;
      Value& value = results[i];
      if (p.keep) {
        value.from_floats(part);
        value.store(x + channel[i]);
      }
      float gamma[Shape::kWidth];
      Chunk<float, Shape::kWidth>::load(p.gamma + channel[i]).to_floats(gamma);
#pragma unroll
      for (int j = 0; j < Shape::kWidth; ++j) gamma[j] = silu<T>(part[j] * scale * gamma[j]);
      value.from_floats(gamma);
      value.store(out + channel[i]);
    }
    move_past<T>(results, channel, place, p);
  }
}

// A warp a pixel of any width, which is read twice, as registers would not hold it. No released model has such.
template <class T>
__global__ void __launch_bounds__(kThreads) wide_rms_silu_window_kernel(RmsSiluWindowParams p, float root_channels) {
  using Value = Chunk<T, 1>;
  const int64_t own = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (own >= p.frame_pixels) return;  // a whole warp or none
  const Place place = place_of(own, p);
  T* const x = static_cast<T*>(p.x) + place.pixel * p.channels;
  T* const out = static_cast<T*>(p.window) + (p.past * p.frame_pixels + place.pixel) * p.channels;
  const auto summed = [&](int channel) {
    Value residual = {};
    if (p.residual != nullptr) {
      residual = Value::load(static_cast<const T*>(p.residual) + place.pixel * p.channels + channel);
    }
    float sum;
    sum_terms<Value, 1>(Value::load(x + channel), residual, &sum, channel, p);
    return sum;
  };
  float squares = 0.0f;
  for (int i = threadIdx.x; i < p.channels; i += kWarpThreads) squares += summed(i) * summed(i);
  const float scale = inverse_norm(warp_sum(squares)) * root_channels;
  for (int i = threadIdx.x; i < p.channels; i += kWarpThreads) {
    const float sum = summed(i);
    if (p.keep) x[i] = from_float<T>(sum);
    Value value[1];
    value[0].words[0] = from_float<T>(silu<T>(sum * scale * p.gamma[i]));
    value[0].store(out + i);
    move_past<T>(value, {i}, place, p);
  }
}

// A block of `lanes` threads for each of its pixels.
template <class Kernel>
cudaError_t launch_pixels(Kernel kernel, int lanes, const RmsSiluWindowParams& p, cudaStream_t stream) {
  const dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(kThreads / lanes));
  const dim3 grid(static_cast<unsigned>((p.frame_pixels + block.y - 1) / block.y), static_cast<unsigned>(p.frames));
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
  if (params.frames == 0 || params.frame_pixels == 0 || params.channels == 0) return cudaSuccess;
  return dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.channels > kMaxHeldChannels) {
      return launch_pixels(wide_rms_silu_window_kernel<T>, kWarpThreads, params, stream);
    }
    const auto fit = [&](const void* address) { return vectors_fit<T>(address, params.channels); };
    const bool whole = fit(params.x) && fit(params.residual) && fit(params.window) && fit(params.history) &&
                       vectors_fit<float>(params.gamma, params.channels) &&
                       vectors_fit<float>(params.bias, params.channels);  // none, address 0, always fits
    if (whole) return launch_whole<T>(params, stream);
    using Narrow = PixelShape<T, 1, 2>;
    return pixel_lanes<Narrow>(params.channels) <= kWarpThreads ? launch_as<Narrow>(params, stream)
                                                                : launch_as<PixelShape<T, 1, 32>>(params, stream);
  });
}

}  // namespace echo
