// A 3x3 convolution of a window as products of warpgroups whose left operand is never laid out (implicit GEMM).
//
// A block computes 16 x 32 pixels of one frame by 96 channels. The sum goes over slabs: a frame of the kernel and 32
// channels of x. Of each the block holds a patch of 18 x 34 pixels and the weights of all nine taps, in one of two
// stages: while the tensor cores work on one slab, the next one is on its way to the other.
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
constexpr int kHeight = kWarpgroups * kSquare, kWidth = kSquares * kSquare;  // of a block
constexpr int kRows = kHeight + 2, kPitch = kWidth + 2, kPixels = kRows * kPitch;
constexpr int kChunksDeep = kDepth / kChunk, kChunksOut = kColumns / kChunk;
constexpr int kPixelBytes = 16;
// Two stages, of which one is in use. A copy's quarter of a warp writes two pixels of four planes: planes 32 bytes off
// the 128 of all banks, so that these eight fall on different ones.
constexpr int kStages = 2;
constexpr int kPlaneBytes = kPixels * kPixelBytes + 96;
static_assert(kPlaneBytes % 128 == 32 && kSquare * kPixelBytes == kMatrixBytes);
constexpr int kTapValues = static_cast<int>(kDepth * kColumns), kSlabValues = static_cast<int>(kTaps) * kTapValues;

template <class T>
struct alignas(128) Stage {
  T patch[kChunksDeep][kPlaneBytes / sizeof(T)];
  T weights[kSlabValues];
};

template <class T>
union Shared {
  Stage<T> stages[kStages];
  T out[kWarps][2 * kWidth][kColumns + kChunk];  // at the end; rows 20 banks apart let a store meet all 32 banks
};
static_assert(sizeof(Shared<uint16_t>) <= 227 << 10);

struct Place {
  int channel, frame, column, row;  // the first that come out
};

ECHO_DEVICE int divide_up(int64_t value, int by) { return static_cast<int>((value + by - 1) / by); }

ECHO_DEVICE Place place_of(const ConvolutionParams& p) {
  unsigned rest = blockIdx.x;
  const auto next = [&](int count) {
    const unsigned of = static_cast<unsigned>(count), index = rest % of;
    rest /= of;
    return static_cast<int>(index);
  };
  Place place;
  place.channel = next(static_cast<int>(p.out_channels / kColumns)) * static_cast<int>(kColumns);
  place.frame = next(static_cast<int>(p.frames));
  place.column = next(divide_up(p.width, kWidth)) * kWidth;
  place.row = static_cast<int>(rest) * kHeight;
  return place;
}

// Starts the copies of a slab: frame `frame` of the kernel, channels of x from `channel` on. Pixels outside are zero.
template <class T>
ECHO_DEVICE void copy_slab(const ConvolutionParams& p, const Place& place, int frame, int channel, Stage<T>& stage) {
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % kChunksDeep;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int channels = static_cast<int>(p.channels);
  const T* const x = static_cast<const T*>(p.x) + (place.frame + frame) * p.x_frame_stride + channel + chunk * kChunk;
#pragma unroll 2
  for (int pixel = thread / kChunksDeep; pixel < kPixels; pixel += kThreads / kChunksDeep) {
    const int y = place.row - 1 + pixel / kPitch, column = place.column - 1 + pixel % kPitch;
    const bool inside = y >= 0 && y < height && column >= 0 && column < width;
    copy_async_16(stage.patch[chunk] + pixel * kChunk, x + (y * width + column) * channels, inside);
  }
  const int64_t tile = (place.channel / kColumns * p.kernel_frames + frame) * (p.channels / kDepth) + channel / kDepth;
  const T* const weight = static_cast<const T*>(p.weight) + tile * kSlabValues;
#pragma unroll 2
  for (int value = thread * static_cast<int>(kChunk); value < kSlabValues; value += kThreads * kChunk) {
    copy_async_16(stage.weights + value, weight + value);
  }
}

using Sums = float[kSquares][kWarpgroupRows * kColumns / kWarpgroupThreads];

// sums += the slab's part, in the background.
template <class T>
ECHO_DEVICE void multiply_slab(const Stage<T>& stage, int warpgroup, Sums& sums) {
  const Operand pixels =
      Operand(stage.patch, kPlaneBytes, kPitch * kPixelBytes).at(warpgroup * kSquare * kPitch * kPixelBytes);
  const Operand weights(stage.weights, static_cast<int>(kColumns * kPixelBytes), kMatrixBytes);
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

// Writes a warp's two rows of pixels by way of shared memory: a lane has pairs of channels, from there whole chunks go.
template <class T>
ECHO_DEVICE void write_out(const ConvolutionParams& p, const Place& place, const Sums& sums,
                           T (&staging)[2 * kWidth][kColumns + kChunk]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads, warp = static_cast<int>(threadIdx.x) / kWarpThreads;
#pragma unroll
  for (int square = 0; square < kSquares; ++square) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; i += 2) {
      const int pixel = i / 2 % 2 * kWidth + square * kSquare + lane / kQuad;
      const int channel = i / 4 * kFragmentColumns + lane % kQuad * 2;
      const uint32_t pair = pack<T>(sums[square][i], sums[square][i + 1]);
      memcpy(&staging[pixel][channel], &pair, sizeof pair);
    }
  }
  __syncwarp();
  const int first = place.row + warp * 2, width = static_cast<int>(p.width);
  T* const out = static_cast<T*>(p.out) + place.frame * p.out_frame_stride + place.channel;
#pragma unroll 4
  for (int item = lane; item < 2 * kWidth * kChunksOut; item += kWarpThreads) {
    const int pixel = item / kChunksOut, chunk = item % kChunksOut;
    const int y = first + pixel / kWidth, x = place.column + pixel % kWidth;
    if (y >= static_cast<int>(p.height) || x >= width) continue;
    const auto values = Vec<T>::load(&staging[pixel][chunk * kChunk]);
    values.store(out + (static_cast<int64_t>(y) * width + x) * p.out_channels + chunk * kChunk);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) causal_conv_hopper_kernel(const ConvolutionParams p) {
  if constexpr (kHasWarpgroupProducts) {
    auto& shared = *dynamic_shared<Shared<T>>();
    const Place place = place_of(p);
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    const int deep = static_cast<int>(p.channels / kDepth), slabs = static_cast<int>(p.kernel_frames) * deep;
    const auto copy = [&](int slab) {
      copy_slab(p, place, slab / deep, slab % deep * static_cast<int>(kDepth), shared.stages[slab % kStages]);
      commit_copies();
    };
    Sums sums = {};
    copy(0);
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab) {
      wait_copies<0>();
      fence_async_reads();
      __syncthreads();  // the slab is there for all, and all are done with the one before it
#pragma unroll
      for (auto& square : sums) hold(square);
      begin_products();
      multiply_slab(shared.stages[slab % kStages], warp / (kWarps / kWarpgroups), sums);
      commit_products();
      if (slab + 1 < slabs) copy(slab + 1);
      wait_products<0>();
#pragma unroll
      for (auto& square : sums) hold(square);
    }
    __syncthreads();  // the stages become what goes out
    write_out(p, place, sums, shared.out[warp]);
  }
}

}  // namespace

cudaError_t compute_capability(int64_t& capability) {
  capability = 0;
#if defined(ECHO_RT_EMULATED)
  capability = kCapability;
#else
  int device = 0, major = 0, minor = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  for (const auto& [value, attribute] :
       {std::pair(&major, cudaDevAttrComputeCapabilityMajor), std::pair(&minor, cudaDevAttrComputeCapabilityMinor)}) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device); error != cudaSuccess) return error;
  }
  capability = 10 * major + minor;
#endif
  return cudaSuccess;
}

}  // namespace hopper

cudaError_t launch_causal_conv_hopper(const ConvolutionParams& p, cudaStream_t stream) {
  using namespace hopper;
  constexpr int64_t kMost = INT32_MAX;  // offsets in a frame are counted in 32 bits
  const auto tiles = [](int64_t count, int64_t each) { return (count + each - 1) / each; };
  if (p.channels < kDepth || p.channels % kDepth != 0 || p.out_channels % kColumns != 0 || p.kernel_frames < 1 ||
      p.height > kMost - kRows || p.width > kMost - kPitch || p.height * p.width > kMost / p.channels ||
      p.kernel_frames * (p.channels / kDepth) > kMost || p.bias != nullptr || p.residual != nullptr ||
      !rows_start_on_chunks(p.x, p.frames + p.kernel_frames - 1, p.x_frame_stride) ||
      !rows_start_on_chunks(p.out, p.frames, p.out_frame_stride) || !rows_start_on_chunks(p.weight, 1, 0)) {
    return cudaErrorInvalidValue;
  }
  const int64_t blocks = p.out_channels / kColumns * p.frames * tiles(p.height, kHeight) * tiles(p.width, kWidth);
  if (blocks > kMost) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return dispatch_16bit(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(causal_conv_hopper_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(Shared<T>),
                  stream, p);
  });
}

}  // namespace echo
