// Where every latent frame lives in the KV buffer, what it overwrites, and which temporal RoPE id it has.
//
// The buffer holds, in this order,
//
//     memory (memory_frames) | sink (sink_frames) | local ring (local_frames)
//
// The sink is the first sink_frames of the video and stays for ever. Every later frame goes round the ring, so a block
// is evicted by being overwritten. All numbers here count latent frames; a kernel multiplies by tokens per frame.
// Frames and blocks are absolute, counted from the start of the video, and 64 bit wide: a stream has no last frame.
//
// Pure arithmetic, the same on the host and on the GPU. Nothing is checked here; whoever makes a RingLayout has seen to
// it that every count is positive (memory_frames may be 0, and sink_frames where there is no memory), sink_frames and
// local_frames are multiples of frames_per_block, memory_frames <= frames_per_block, and sink_frames + memory_frames +
// local_frames <= max_temporal_id + 1. That is what makes the methods right: no block straddles sink and ring or the
// end of the ring, and no id leaves 0..max_temporal_id.

#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace echo {

struct RingLayout {
  int64_t frames_per_block;
  int64_t sink_frames;
  int64_t local_frames;
  int64_t memory_frames;
  int64_t max_temporal_id;

  // ---- blocks and frames

  // The first absolute frame of a block.
  ECHO_HOST_DEVICE constexpr int64_t first_frame(int64_t block) const { return block * frames_per_block; }

  // The last absolute frame of a block, inclusive.
  ECHO_HOST_DEVICE constexpr int64_t last_frame(int64_t block) const {
    return first_frame(block) + frames_per_block - 1;
  }

  // Do the frames of this block belong to the sink?
  ECHO_HOST_DEVICE constexpr bool is_sink_block(int64_t block) const { return last_frame(block) < sink_frames; }

  // ---- slots

  // All slots of the buffer.
  ECHO_HOST_DEVICE constexpr int64_t slots() const { return memory_frames + sink_frames + local_frames; }

  // The slot that an absolute frame is written to, in [memory_frames, slots()).
  ECHO_HOST_DEVICE constexpr int64_t slot(int64_t frame) const {
    if (frame < sink_frames) return memory_frames + frame;
    return memory_frames + sink_frames + (frame - sink_frames) % local_frames;
  }

  // Does this block overwrite a block that was in the ring?
  ECHO_HOST_DEVICE constexpr bool evicts(int64_t block) const { return evicted_frame(block) >= sink_frames; }

  // The first of the frames_per_block absolute frames that this block overwrites; they lie at slot(first_frame(block)).
  // Means something only where evicts(block).
  ECHO_HOST_DEVICE constexpr int64_t evicted_frame(int64_t block) const { return first_frame(block) - local_frames; }

  // The oldest absolute frame in the ring once this block is written; sink_frames while the ring is empty.
  ECHO_HOST_DEVICE constexpr int64_t oldest_local(int64_t block) const {
    return larger(sink_frames, last_frame(block) - local_frames + 1);
  }

  // How many frames the ring holds once this block is written, 0 to local_frames.
  ECHO_HOST_DEVICE constexpr int64_t local_filled(int64_t block) const {
    return larger(0, last_frame(block) - oldest_local(block) + 1);
  }

  // ---- the one contiguous slice of slots that this block attends to, itself included

  // The first attended slot.
  ECHO_HOST_DEVICE constexpr int64_t attended_begin(bool memory_active) const {
    return memory_active ? 0 : memory_frames;
  }

  // One past the last attended slot. A filling ring is filled from its start, so what is filled follows the sink.
  ECHO_HOST_DEVICE constexpr int64_t attended_end(int64_t block) const {
    if (is_sink_block(block)) return memory_frames + last_frame(block) + 1;
    return memory_frames + sink_frames + local_filled(block);
  }

  // ---- temporal ids

  // How far the window has moved past the ids that the model was trained with.
  ECHO_HOST_DEVICE constexpr int64_t shift(int64_t block) const {
    return larger(0, last_frame(block) - max_temporal_id);
  }

  // The id of an absolute frame while this block is generated. It holds for local, memory and query frames; a sink
  // frame keeps its own number as its id, which in absolute frames is that number + shift(block).
  ECHO_HOST_DEVICE constexpr int64_t temporal_id(int64_t block, int64_t frame) const { return frame - shift(block); }

  // The absolute frame whose angle the first memory frame takes: the memory sits right before the oldest local frame.
  ECHO_HOST_DEVICE constexpr int64_t memory_frame(int64_t block) const { return oldest_local(block) - memory_frames; }

  // Is there a memory, and do its ids keep clear of the sink's?
  ECHO_HOST_DEVICE constexpr bool memory_fits(int64_t block) const {
    return memory_frames > 0 && temporal_id(block, memory_frame(block)) >= sink_frames;
  }

 private:
  ECHO_HOST_DEVICE static constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
};

}  // namespace echo
