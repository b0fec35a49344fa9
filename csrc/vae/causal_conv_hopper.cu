// A 3x3 convolution of a window as products of warpgroups whose left operand is never laid out (implicit GEMM).
//
// A tile is 16 x 32 pixels of one frame by 96 channels that come out; a block computes one after the other. The sum of
// a tile goes over slabs: a frame of the kernel and 32 channels of x. Of each the block holds a patch of 18 x 34 pixels
// and the weights of all nine taps, in one of two stages.
//
// Two warpgroups multiply and a third one copies, so that no copy stands behind products in the order of a warp. It
// fills a stage as soon as that is empty, whichever tile the slab belongs to: the weights, which lie in one piece, by a
// bulk copy, the patch pixel by pixel, zeros around the frame. That its own copies are there it waits for itself, and
// fences them, as it has nothing else to do. Those that multiply empty a stage early in the next slab: they wait for a
// slab's products when some of the next one's are queued, so that the tensor cores never run dry.
// While a tile is written out, by way of shared memory of its own, the first two slabs of the next one arrive.
//
// Which tile is next says a counter that all blocks count up, one tile ahead: where a block starts late, as another
// kernel holds its multiprocessor, the others take its tiles. What comes out does not depend on who takes what.
//
// A product takes 64 pixels, 8 x 8, by 16 channels from the patch as it lies there. The patch holds chunks of 8
// channels apart, of each all pixels in rows, 16 bytes a pixel: 8 neighbours are the 128 bytes of a matrix of the
// operand, from whichever pixel on. So a tap is another start, a row of pixels the stride from matrix to matrix, and
// nothing moves.
//
// Counts, none measured: a slab is 39.2 KB of patch and 55.3 KB of weights for 28.3 MFLOP, 299 FLOP a byte from L2: 2.0
// TB/s at 600 TFLOP/s. Of shared memory a product reads 5 KB for 98,304 multiply-adds, which are 48 clocks of the
// tensor cores at full rate and 40 of the memory's. Its 192 sums a thread and 211 KB leave room for one block an SM.

#include "common/barrier.cuh"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/tile.cuh"
#include "common/vec.cuh"
#include "common/warpgroup.cuh"
#include "vae/causal_conv_hopper.h"

namespace echo {
namespace hopper {
namespace {

constexpr int kWarpgroups = 2, kWarps = kWarpgroups * kWarpgroupThreads / kWarpThreads;  // that multiply
constexpr int kProducers = kWarpgroupThreads, kThreads = kWarpgroups * kWarpgroupThreads + kProducers;
// Of a thread: what __launch_bounds__ leave each of them, of which those that copy need less, the others more.
constexpr int kRegisters = 168, kProducerRegisters = 40, kRegistersToMultiply = 232;
static_assert(kWarpgroups * kRegistersToMultiply + kProducerRegisters == (kWarpgroups + 1) * kRegisters);
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

// Pixels of each warp on their way out. 20 banks apart they let a store meet all 32 banks.
constexpr int kStaged = 2 * kSquare;
template <class T>
using Staging = T[kWarps][kStaged][kColumns + kChunk];

template <class T>
struct Shared {
  Slab<T> slabs[kStages];
  alignas(16) Staging<T> out;
  Barrier full[kStages];   // the slab is there
  Barrier empty[kStages];  // nobody reads it any more
  Barrier drawn;           // the next tile is known to those that copy
  Barrier ahead;           // the first warpgroup has its first slab behind it
  unsigned tile[kStages];  // to which the slab belongs; none where there are no more
  unsigned next[2];        // tile of those that copy, in turn
};
static_assert(sizeof(Shared<uint16_t>) <= 227 << 10);

struct Place {
  int channel, frame, column, row;  // the first that come out
};

ECHO_HOST_DEVICE int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Tiles that are computed at the same time share their pixels, and the frames that they have in common, in L2.
[[maybe_unused]] ECHO_DEVICE Place place_of(const ConvolutionParams& p, unsigned tile) {
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

// Starts the copies of a patch, by those that copy: a frame of x, channels from `channel` on. Pixels outside are zero.
template <class T>
ECHO_DEVICE void copy_patch(const ConvolutionParams& p, const Place& place, int thread, const T* x, Slab<T>& slab) {
  const int chunk = thread % kChunksDeep;
  const int height = static_cast<int>(p.height), width = static_cast<int>(p.width);
  const int channels = static_cast<int>(p.channels);
#pragma unroll 4
  for (int pixel = thread / kChunksDeep; pixel < kPixels; pixel += kProducers / kChunksDeep) {
    const int y = place.row - 1 + pixel / kPitch, column = place.column - 1 + pixel % kPitch;
    const bool inside = y >= 0 && y < height && column >= 0 && column < width;
    copy_async_16(slab.patch[chunk] + pixel * kChunk, x + chunk * kChunk + (y * width + column) * channels, inside);
  }
}

// Fills stages for as long as there are tiles, and then tells that there are no more.
template <class T>
ECHO_DEVICE void copy_tiles(const ConvolutionParams& p, unsigned tiles, int* taken, Shared<T>& shared) {
  const int thread = static_cast<int>(threadIdx.x) - kWarpgroups * kWarpgroupThreads;
  const bool first = thread == 0;
  const int deep = static_cast<int>(p.channels / kDepth);
  Turn<kStages> turn;
  const auto fill = [&](unsigned tile, int bytes) {
    shared.empty[turn.stage].wait(turn.parity ^ 1);  // in the first round they are
    if (!first) return;
    shared.tile[turn.stage] = tile;
    shared.full[turn.stage].arrive_expecting(bytes);
  };
  unsigned tile = blockIdx.x;
  for (unsigned round = 0; tile < tiles; round ^= 1) {
    const unsigned next = first ? gridDim.x + static_cast<unsigned>(atomicAdd(taken, 1)) : 0;
    const Place place = place_of(p, tile);
    const T* weights =
        static_cast<const T*>(p.weight) + place.channel / kColumns * p.kernel_frames * deep * kSlabValues;
    for (int frame = 0; frame < static_cast<int>(p.kernel_frames); ++frame) {
      const T* x = static_cast<const T*>(p.x) + (place.frame + frame) * p.x_frame_stride;
      for (int depth = 0; depth < deep; ++depth, x += kDepth, weights += kSlabValues) {
        Slab<T>& slab = shared.slabs[turn.stage];
        Barrier& full = shared.full[turn.stage];
        fill(tile, sizeof slab.weights);
        if (first) copy_bulk(slab.weights, weights, sizeof slab.weights, full);
        copy_patch(p, place, thread, x, slab);
        commit_copies();
        wait_copies<0>();
        fence_async();
        full.arrive();
        turn.advance();
      }
    }
    if (first) shared.next[round] = next;
    shared.drawn.arrive();
    shared.drawn.wait(round);
    tile = shared.next[round];
  }
  fill(tile, 0);
  shared.full[turn.stage].arrive();
}

using Sums = float[kSquares][kWarpgroupRows * kColumns / kWarpgroupThreads];

// sums += what taps kFirst to kLast of the slab add to them, in the background.
template <int kFirst, int kLast, class T>
ECHO_DEVICE void multiply_taps(const Slab<T>& slab, int warpgroup, Sums& sums) {
  const Operand pixels =
      Operand(slab.patch, kPlaneBytes, kPitch * kPixelBytes).at(warpgroup * kSquare * kPitch * kPixelBytes);
  const Operand weights(slab.weights, static_cast<int>(kColumns * kPixelBytes), kMatrixBytes);
  begin_products();
#pragma unroll
  for (int tap = kFirst; tap <= kLast; ++tap) {
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
  commit_products();
}

// Writes a warp's pixels by way of shared memory: a lane has pairs of channels, from there chunks go.
template <class T>
ECHO_DEVICE void write_out(const ConvolutionParams& p, const Place& place, const Sums& sums,
                           T (&staging)[kStaged][kColumns + kChunk]) {
  constexpr int kRows = kHeight / kWarps, kChunksOut = kColumns / kChunk;
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads, warp = static_cast<int>(threadIdx.x) / kWarpThreads;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int y = place.row + warp * kRows + row;
    if (y >= static_cast<int>(p.height)) return;
#pragma unroll
    for (int begin = 0; begin < kWidth; begin += kStaged) {
      const int column = place.column + begin, count = min(kStaged, static_cast<int>(p.width) - column) * kChunksOut;
#pragma unroll
      for (int pixel = 0; pixel < kStaged; pixel += kSquare) {
#pragma unroll
        for (int chunk = 0; chunk < kChunksOut; ++chunk) {
          const float* pair = &sums[(begin + pixel) / kSquare][4 * chunk + 2 * row];
          const uint32_t rounded = pack<T>(pair[0], pair[1]);
          memcpy(&staging[pixel + lane / kQuad][chunk * kChunk + lane % kQuad * 2], &rounded, sizeof rounded);
        }
      }
      __syncwarp();
      T* const pixels = static_cast<T*>(p.out) + place.frame * p.out_frame_stride +
                        (static_cast<int64_t>(y) * p.width + column) * p.out_channels + place.channel;
#pragma unroll 2
      for (int item = lane; item < count; item += kWarpThreads) {
        const int pixel = item / kChunksOut, chunk = item % kChunksOut;
        Vec<T>::load(&staging[pixel][chunk * kChunk]).store(pixels + pixel * p.out_channels + chunk * kChunk);
      }
      __syncwarp();  // the next pixels go where these were
    }
  }
}

// Computes and writes the tiles whose slabs appear in the stages. One warpgroup sets out a slab later than the other,
// which has the tensor cores to itself until then: later each does when the other writes.
template <class T>
ECHO_DEVICE void multiply_tiles(const ConvolutionParams& p, unsigned tiles, Shared<T>& shared) {
  // By way of a lane, so that the compiler knows that a warp has one, and operands are named by uniform registers.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpThreads, 0);
  const int warpgroup = warp / (kWarps / kWarpgroups), lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int slabs = static_cast<int>(p.kernel_frames * (p.channels / kDepth));
  const auto release = [&](int stage) {
    if (lane == 0) shared.empty[stage].arrive();
  };
  Turn<kStages> turn;
  if (warpgroup > 0) shared.ahead.wait(0);
  for (;;) {
    shared.full[turn.stage].wait(turn.parity);
    const unsigned tile = __shfl_sync(kAllLanes, shared.tile[turn.stage], 0);
    if (tile >= tiles) return;
    Sums sums = {};
#pragma unroll 1
    for (int slab = 0; slab < slabs; ++slab) {
      shared.full[turn.stage].wait(turn.parity);
#pragma unroll
      for (auto& square : sums) hold(square);
      multiply_taps<0, 0>(shared.slabs[turn.stage], warpgroup, sums);
      wait_products<1>();  // for the slab before
      if (slab > 0) release(turn.before());
      multiply_taps<1, kTaps - 1>(shared.slabs[turn.stage], warpgroup, sums);
      if (warpgroup == 0 && slab == 0 && tile == blockIdx.x && lane == 0) shared.ahead.arrive();
      turn.advance();
    }
    wait_products<0>();
#pragma unroll
    for (auto& square : sums) hold(square);
    release(turn.before());
    write_out(p, place_of(p, tile), sums, shared.out[warp]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    causal_conv_hopper_kernel(const ConvolutionParams p, unsigned tiles, int* taken) {
  if constexpr (kHasWarpgroupProducts) {
    auto& shared = *dynamic_shared<Shared<T>>();
    if (threadIdx.x == 0) {
      for (auto& full : shared.full) full.init(kProducers + 1);
      for (auto& empty : shared.empty) empty.init(kWarps);
      shared.drawn.init(kProducers);
      shared.ahead.init(kWarps / kWarpgroups);
      fence_async();
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroups * kWarpgroupThreads) {
      take_registers<kRegistersToMultiply>();
      multiply_tiles(p, tiles, shared);
    } else {
      give_back_registers<kProducerRegisters>();
      copy_tiles(p, tiles, taken, shared);
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

cudaError_t launch_causal_conv_hopper(const ConvolutionParams& p, int* taken, cudaStream_t stream) {
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
                  static_cast<unsigned>(tiles), taken);
  });
}

}  // namespace echo
