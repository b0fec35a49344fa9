// Steps the device-side position to the next block: what a captured graph reads instead of arguments.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "kv_ring/ring_layout.h"

namespace echo {

struct AdvanceParams {
  RingLayout layout;
  int64_t* positions;                 // [5], read and written: block, first frame, shift, memory frame, first slot
  const double* inverse_frequencies;  // [pairs]
  float* temporal_block;              // [layout.frames_per_block, pairs, 2], written
  float* temporal_anchor;             // [layout.memory_frames + layout.sink_frames, pairs, 2], written
  int64_t* write_index;               // [tokens], written: the KV rows that the block occupies
  int64_t pairs;
  int64_t tokens;  // of a block: a multiple of layout.frames_per_block
};

cudaError_t launch_advance(const AdvanceParams& params, cudaStream_t stream);

}  // namespace echo
