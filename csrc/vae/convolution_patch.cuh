// What a block of a convolution holds in shared memory, and where its threads' copies go.
//
// A patch is the part of one frame that the block's output pixels see, in kDepth channels: pixels in rows, kDepth
// channels (64 bytes) a pixel. All taps of the kernel read the same patch, each from another pixel on: ldmatrix takes
// any 8 row addresses. It reads one chunk of each of 8 neighbouring pixels at a time, from any pixel on, and these must
// fall on different banks. Two pixels cover all 32 banks, as the pitch is even the first of them at even columns, so
// chunk c of column x lies where chunk c ^ (x / 2 % 4) would: any 8 neighbours have all 8 places.

#pragma once

#include <type_traits>

#include "common/device.h"
#include "common/ptx.cuh"
#include "common/scalar.h"
#include "common/tile.cuh"
#include "common/vec.cuh"
#include "vae/convolution.h"

namespace echo {
namespace convolution {

// 4 warps with 64 pixels each. 64 pixels by 96 channels a warp: 5 KB of fragments from shared memory (40 clocks of its
// bandwidth) for 48 mma (77 clocks). Their 192 sums leave a lane 63 registers, and two blocks fill the register file,
// so that one computes while the other waits at a barrier, begins or ends.
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpThreads;
constexpr int kSide = 16;  // output pixels of a block: 16 x 16; a row of them is a fragment's rows
constexpr int kWarpRows = kSide / kWarps;
// 96, 192 and 384, the decoder's widths, are multiples of it. The few channels of its last convolution have their own.
constexpr int kWideColumns = 96;
constexpr int kNarrowColumns = 16;
constexpr int kDepth = 32;
constexpr int kChunksDeep = kDepth / kChunk;
constexpr int kApart = kThreads / kChunksDeep;  // of the pixels, or rows of weights, whose chunks one thread copies
// Tiles of weights in shared memory: the one in use and three under way. A tile feeds 384 mma of its block, 1200 clocks
// where two blocks take turns, so that L2 has some 3600 clocks to bring one.
constexpr int kStages = 4;
constexpr int kTilesAhead = kStages - 1;

template <typename T, int kSize>
struct alignas(128) Patch {
  static constexpr int kRows = kSide + kSize - 1;
  static constexpr int kPitch = (kRows + 1) / 2 * 2;
  static constexpr int kCopies = (kRows * kPitch + kApart - 1) / kApart;  // of a thread

  T values[kRows * kPitch * kDepth];

  static ECHO_DEVICE int offset(int row, int column, int chunk) {
    return (row * kPitch + column) * kDepth + (chunk ^ (column / 2 % kChunksDeep)) * kChunk;
  }
};

template <typename T, int kSize_, int kColumns_>
struct Shared {
  static constexpr int kSize = kSize_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kTaps = kSize * kSize;
  // The next patch is under way while the taps of this one are taken; a single tap is too short for that.
  static constexpr int kPatchesAhead = kTaps == 1 ? kTilesAhead : 1;
  static constexpr int kPatches = kPatchesAhead + 1;
  using Left = Patch<T, kSize>;
  using Right = Tile<T, kColumns, kDepth>;

  struct Ring {
    Left patches[kPatches];
    Right weights[kStages];
  };
  union {
    Ring ring;
    float sums[kWarps][kFragment][kColumns + 8];  // at the end; rows 8 banks apart let a store meet all 32 banks
  };
};
// Two blocks of 3x3 and 2x2 taps fit an SM of 164 KB, of one tap one of 228; one block fits the 100 KB of sm_86, sm_89
// and sm_120.
static_assert(sizeof(Shared<uint16_t, 3, kWideColumns>) <= 80 * 1024);
static_assert(sizeof(Shared<uint16_t, 2, kWideColumns>) <= 80 * 1024);
static_assert(sizeof(Shared<uint16_t, 1, kWideColumns>) <= 99 * 1024);

// What a block computes: kSide x kSide pixels of the picture x, of which out has one phase, and some channels of them.
struct Place {
  int row, column;              // the first pixel
  int frame;                    // that comes out
  int channel;                  // the first that comes out
  int phase_row, phase_column;  // of the enlarged picture; 0 where it is not enlarged
};

// Where the sum stands: which frame of the kernel, which channels of x.
struct Slab {
  int frame = 0, channel = 0;

  ECHO_DEVICE void advance(int channels) {
    channel += kDepth;
    if (channel < channels) return;
    channel = 0;
    ++frame;
  }
};

// What one thread copies: chunk `chunk_` of pixels (and rows of weights) index_, index_ + kApart, ... What does not
// exist, past the last channel or outside of the picture, is zero. kWhole: chunks of x and weight lie on 16 bytes and
// all exist or none of it; else a thread fetches them value by value, and waits.
template <typename T, typename SharedT, bool kWhole>
class Mover {
 public:
  using Left = typename SharedT::Left;
  using Right = typename SharedT::Right;

  ECHO_DEVICE Mover(const ConvolutionParams& p, const Place& place)
      : p_(p),
        chunk_(static_cast<int>(threadIdx.x) % kChunksDeep),
        index_(static_cast<int>(threadIdx.x) / kChunksDeep),
        row_(place.row + place.phase_row - SharedT::kSize / 2),
        column_(place.column + place.phase_column - SharedT::kSize / 2),
        weights_left_(static_cast<int>(p.out_channels) - place.channel - index_),
        weight_row_(static_cast<int>(p.kernel_frames * p.channels) * SharedT::kTaps),
        x_(static_cast<const T*>(p.x) + place.frame * p.x_frame_stride + chunk_ * kChunk),
        weight_(static_cast<const T*>(p.weight) + chunk_ * kChunk +
                static_cast<int64_t>((2 * place.phase_row + place.phase_column) * static_cast<int>(p.out_channels) +
                                     place.channel + index_) *
                    weight_row_) {}

  // Starts the copies first .. end - 1 of this thread's kCopies of a slab's patch.
  ECHO_DEVICE void copy_patch(const Slab& slab, Left& patch, int first, int end) const {
    if (slab.frame >= static_cast<int>(p_.kernel_frames)) return;
    const int height = static_cast<int>(p_.height), width = static_cast<int>(p_.width);
    const int channels_left = left_of(slab);
    const T* frame = x_ + slab.frame * p_.x_frame_stride + slab.channel;
#pragma unroll 1
    for (int i = first; i < end; ++i) {
      const int pixel = index_ + i * kApart, row = pixel / Left::kPitch, column = pixel % Left::kPitch;
      if (row >= Left::kRows) return;
      const int y = row_ + row, x = column_ + column;
      const bool seen = Left::kPitch == Left::kRows || column < Left::kRows;
      const bool inside = seen && y >= 0 && y < height && x >= 0 && x < width;
      copy(patch.values + patch.offset(row, column, chunk_), frame + (y * width + x) * static_cast<int>(p_.channels),
           inside ? channels_left : 0);
    }
  }

  // Starts the copies of a tap's weights.
  ECHO_DEVICE void copy_weights(const Slab& slab, int tap, Right& weights) const {
    if (slab.frame >= static_cast<int>(p_.kernel_frames)) return;
    const int channels_left = left_of(slab);
    const T* source = weight_ + (slab.frame * SharedT::kTaps + tap) * static_cast<int>(p_.channels) + slab.channel;
    T* const target = weights.values + weights.offset(index_, chunk_);
#pragma unroll
    for (int i = 0; i * kApart < SharedT::kColumns; ++i) {
      if (SharedT::kColumns < kApart && index_ >= SharedT::kColumns) return;
      copy(target + i * kApart * kDepth, source + i * kApart * weight_row_,
           i * kApart < weights_left_ ? channels_left : 0);
    }
  }

 private:
  // Channels of x from this thread's chunk on.
  ECHO_DEVICE int left_of(const Slab& slab) const {
    return static_cast<int>(p_.channels) - slab.channel - chunk_ * kChunk;
  }

  // A chunk of which `count` values exist.
  static ECHO_DEVICE void copy(T* target, const T* source, int count) {
    if constexpr (kWhole) {
      copy_async_16(target, source, count > 0);
    } else {
      Vec<T> values;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = i < count ? source[i] : from_float<T>(0.0f);
      values.store(target);
    }
  }

  const ConvolutionParams& p_;
  const int chunk_, index_;
  const int row_, column_;  // of x, where the patch begins
  const int weights_left_;  // rows of weights from index_ on
  const int weight_row_;    // values in a row of weights
  const T *x_, *weight_;
};

}  // namespace convolution
}  // namespace echo
