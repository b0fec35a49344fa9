// A 3x3 convolution of a window as products of warpgroups whose left operand is never laid out (implicit GEMM).
//
// A tile is 16 x 32 pixels of one frame by 96 channels that come out; a block computes one after the other. The sum of
// a tile goes over slabs: a frame of the kernel and 32 channels of x. Of each the block holds a patch of 18 x 34 pixels
// and the weights of all nine taps, in one of two stages: while the tensor cores work on one slab, the next one is on
// its way to the other. Behind a tile's last slab that is the first of the next tile, while this one is written out.
//
// A product takes 64 pixels, 8 x 8, by 16 channels from the patch as it lies there. The patch holds chunks of 8
// channels apart, of each all pixels in rows, 16 bytes a pixel: 8 neighbours are the 128 bytes of a matrix of the
// operand, from whichever pixel on. So a tap is another start, a row of pixels the stride from matrix to matrix, and
// nothing moves.
//
// Counts, none measured: a slab is 39.2 KB of patch and 55.3 KB of weights for 28.3 MFLOP, 299 FLOP a byte from L2: 2.0
// TB/s at 600 TFLOP/s. Of shared memory a product reads 5 KB for 98,304 multiply-adds, which are 48 clocks of the
// tensor cores at full rate and 40 of the memory's. Its 192 sums a thread and 190 KB leave room for one block an SM.

#include "common/launch.h"
#include "common/tile.cuh"
#include "common/vec.cuh"
#include "common/warpgroup.cuh"
#include "vae/causal_conv_hopper.h"

namespace echo {
namespace hopper {
namespace {

constexpr int kWarpgroups = 2, kThreads = kWarpgroups * kWarpgroupThreads, kWarps = kThreads / kWarpThreads;
constexpr int kSquare = 8;                                                   // pixels of a product: 8 x 8
constexpr int kSquares = 4;                                                  // beside each other, of a warpgroup
constexpr int kHeight = kWarpgroups * kSquare, kWidth = kSquares * kSquare;  // of a tile
constexpr int kPatchRows = kHeight + 2, kPitch = kWidth + 2, kPixels = kPatchRows * kPitch;
constexpr int kChunksDeep = kDepth / kChunk;
constexpr int kPixelBytes = 16;
constexpr int kStages = 2;
// A quarter of a warp copies two pixels of four planes at once: planes that begin 32 bytes off the 128 of all banks let
// these eight fall on different ones.
constexpr int kPlaneBytes = kPixels * kPixelBytes + 96;
static_assert(kPlaneBytes % 128 == 32 && kSquare * kPixelBytes == kMatrixBytes);
constexpr int kSlabValues = static_cast<int>(kTaps * kDepth * kColumns);  // of its weights

template <class T>
struct alignas(128) Slab {
  T patch[kChunksDeep][kPlaneBytes / sizeof(T)];
  T weights[kSlabValues];
};

// A row of pixels of each warp on its way out. Pixels 20 banks apart let a store meet all 32 banks.
template <class T>
using Staging = T[kWarps][kWidth][kColumns + kChunk];

template <class T>
union alignas(128) Stage {
  Slab<T> slab;
  Staging<T> out;
};

template <class T>
struct Shared {
  Stage<T> stages[kStages];
};
static_assert(sizeof(Stage<uint16_t>) == sizeof(Slab<uint16_t>) && sizeof(Shared<uint16_t>) <= 227 << 10);

struct Place {
  int channel, frame, column, row;  // the first that come out
};

ECHO_HOST_DEVICE int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Tiles that are computed at the same time share their pixels, and the frames that they have in common, in L2.
ECHO_DEVICE Place place_of(const ConvolutionParams& p, unsigned tile) {
  const auto next = [&](int64_t count) {
    const unsigned of = static_cast<unsigned>(count), index = tile % of;
    tile /= of;
    return static_cast<int>(index);
  };
  Place place;
  place.channel = next(p.out_channels / kColumns) * static_cast<int>(kColumns);
  place.frame = next(p.frames);
  place.column = next(divide_up(p.width, kWidth)) * kWidth;
  place.row = static_cast<int>(tile) * kHeight;
  return place;
}

// Starts the copies of a slab: frame `frame` of the kernel, channels of x from `channel` on. Pixels outside are zero.
template <class T>
ECHO_DEVICE void copy_slab(const ConvolutionParams& p, const Place& place, int frame, int channel, Slab<T>& slab) {
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % kChunksDeep;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int channels = static_cast<int>(p.channels);
  const T* const x = static_cast<const T*>(p.x) + (place.frame + frame) * p.x_frame_stride + channel + chunk * kChunk;
#pragma unroll 2
  for (int pixel = thread / kChunksDeep; pixel < kPixels; pixel += kThreads / kChunksDeep) {
    const int y = place.row - 1 + pixel / kPitch, column = place.column - 1 + pixel % kPitch;
    const bool inside = y >= 0 && y < height && column >= 0 && column < width;
    copy_async_16(slab.patch[chunk] + pixel * kChunk, x + (y * width + column) * channels, inside);
  }
  const int64_t tile = (place.channel / kColumns * p.kernel_frames + frame) * (p.channels / kDepth) + channel / kDepth;
  const T* const weights = static_cast<const T*>(p.weight) + tile * kSlabValues;
#pragma unroll 2
  for (int value = thread * static_cast<int>(kChunk); value < kSlabValues; value += kThreads * kChunk) {
    copy_async_16(slab.weights + value, weights + value);
  }
}

using Sums = float[kSquares][kWarpgroupRows * kColumns / kWarpgroupThreads];

// sums += the slab's part, in the background.
template <class T>
ECHO_DEVICE void multiply_slab(const Slab<T>& slab, int warpgroup, Sums& sums) {
  const Operand pixels =
      Operand(slab.patch, kPlaneBytes, kPitch * kPixelBytes).at(warpgroup * kSquare * kPitch * kPixelBytes);
  const Operand weights(slab.weights, static_cast<int>(kColumns * kPixelBytes), kMatrixBytes);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma unroll
    for (int chunk = 0; chunk < kChunksDeep; chunk += 2) {
#pragma unroll
      for (int square = 0; square < kSquares; ++square) {
        const int pixel = tap / 3 * kPitch + tap % 3 + square * kSquare;
        multiply_async<T>(sums[square], pixels.at(pixel * kPixelBytes + chunk * kPlaneBytes),
                          weights.at((tap * kChunksDeep + chunk) * static_cast<int>(kColumns) * kPixelBytes));
      }
    }
  }
}

// Writes a warp's pixels, a row at a time by way of shared memory: a lane has pairs of channels, from there chunks go.
template <class T>
ECHO_DEVICE void write_out(const ConvolutionParams& p, const Place& place, const Sums& sums,
                           T (&staging)[kWidth][kColumns + kChunk]) {
  constexpr int kRows = kHeight / kWarps, kChunksOut = kColumns / kChunk;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads, warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int count = min(kWidth, static_cast<int>(p.width) - place.column) * kChunksOut;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int y = place.row + warp * kRows + row;
    if (y >= static_cast<int>(p.height)) return;
#pragma unroll
    for (int square = 0; square < kSquares; ++square) {
#pragma unroll
      for (int chunk = 0; chunk < kChunksOut; ++chunk) {
        const float* pair = &sums[square][4 * chunk + 2 * row];
        const uint32_t rounded = pack<T>(pair[0], pair[1]);
        memcpy(&staging[square * kSquare + lane / kQuad][chunk * kChunk + lane % kQuad * 2], &rounded, sizeof rounded);
      }
    }
    __syncwarp();
    T* const pixels = static_cast<T*>(p.out) + place.frame * p.out_frame_stride +
                      (static_cast<int64_t>(y) * p.width + place.column) * p.out_channels + place.channel;
#pragma unroll 4
    for (int item = lane; item < count; item += kWarpThreads) {
      const int pixel = item / kChunksOut, chunk = item % kChunksOut;
      Vec<T>::load(&staging[pixel][chunk * kChunk]).store(pixels + pixel * p.out_channels + chunk * kChunk);
    }
    __syncwarp();  // the next row goes where this one was
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) causal_conv_hopper_kernel(const ConvolutionParams p, unsigned tiles) {
  if constexpr (kHasWarpgroupProducts) {
    auto& stages = dynamic_shared<Shared<T>>()->stages;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, warpgroup = warp / (kWarps / kWarpgroups);
    const int deep = static_cast<int>(p.channels / kDepth), slabs = static_cast<int>(p.kernel_frames) * deep;
    const auto copy = [&](const Place& place, int slab, int stage) {
      copy_slab(p, place, slab / deep, slab % deep * static_cast<int>(kDepth), stages[stage].slab);
      commit_copies();
    };
    Place place = place_of(p, blockIdx.x);
    copy(place, 0, 0);
    int stage = 0;
    for (unsigned tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const Place next = place_of(p, tile + gridDim.x);
      Sums sums = {};
#pragma unroll 1
      for (int slab = 0; slab < slabs; ++slab) {
        wait_copies<0>();
        fence_async_reads();
        __syncthreads();  // the slab is there for all, and all are done with what the next one replaces
#pragma unroll
        for (auto& square : sums) hold(square);
        begin_products();
        multiply_slab(stages[stage].slab, warpgroup, sums);
        commit_products();
        stage = kStages - 1 - stage;
        if (slab + 1 < slabs) {
          copy(place, slab + 1, stage);
        } else if (tile + gridDim.x < tiles) {
          copy(next, 0, stage);
        }
        wait_products<0>();
#pragma unroll
        for (auto& square : sums) hold(square);
      }
      __syncthreads();  // nobody reads the last slab any more: what goes out takes its place
      write_out(p, place, sums, stages[kStages - 1 - stage].out[warp]);
      place = next;
    }
  }
}

// ---- what the device is

#if defined(ECHO_RT_EMULATED)
// Fewer than the tiles of a test.
cudaError_t count_multiprocessors(int& count) {
  count = 2;
  return cudaSuccess;
}
#else
cudaError_t ask(cudaDeviceAttr attribute, int& value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&value, attribute, device);
}

cudaError_t count_multiprocessors(int& count) { return ask(cudaDevAttrMultiProcessorCount, count); }
#endif

}  // namespace

cudaError_t compute_capability(int64_t& capability) {
#if defined(ECHO_RT_EMULATED)
  capability = kCapability;
  return cudaSuccess;
#else
  int major = 0, minor = 0;
  cudaError_t error = ask(cudaDevAttrComputeCapabilityMajor, major);
  if (error == cudaSuccess) error = ask(cudaDevAttrComputeCapabilityMinor, minor);
  capability = 10 * major + minor;
  return error;
#endif
}

}  // namespace hopper

cudaError_t launch_causal_conv_hopper(const ConvolutionParams& p, cudaStream_t stream) {
  using namespace hopper;
  constexpr int64_t kMost = INT32_MAX;  // offsets in a frame are counted in 32 bits
  if (p.channels < kDepth || p.channels % kDepth != 0 || p.out_channels % kColumns != 0 || p.kernel_frames < 1 ||
      p.height > kMost - kPatchRows || p.width > kMost - kPitch || p.height * p.width > kMost / p.channels ||
      p.kernel_frames * (p.channels / kDepth) > kMost || p.bias != nullptr || p.residual != nullptr ||
      !rows_start_on_chunks(p.x, p.frames + p.kernel_frames - 1, p.x_frame_stride) ||
      !rows_start_on_chunks(p.out, p.frames, p.out_frame_stride) || !rows_start_on_chunks(p.weight, 1, 0)) {
    return cudaErrorInvalidValue;
  }
  const int64_t tiles =
      p.out_channels / kColumns * p.frames * divide_up(p.height, kHeight) * divide_up(p.width, kWidth);
  if (tiles == 0) return cudaSuccess;
  int multiprocessors = 0;
  if (const cudaError_t error = count_multiprocessors(multiprocessors); error != cudaSuccess) return error;
  if (tiles > kMost - multiprocessors) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors));
  return dispatch_16bit(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(causal_conv_hopper_kernel<T>, grid, dim3(kThreads), sizeof(Shared<T>), stream, p,
                  static_cast<unsigned>(tiles));
  });
}

}  // namespace echo
