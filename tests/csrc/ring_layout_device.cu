// Compiles ring_layout.h for the GPU: nvcc refuses a method that the device cannot call.
// What the methods say is checked by test_ring_layout.py; here only that the compiler agrees with itself.

#include "kv_ring/ring_layout.h"

namespace {

// The released recipe: 3 frames a block, 3 sink, 9 local, 3 memory, ids 0..20.
constexpr echo::RingLayout kReleased{3, 3, 9, 3, 20};

static_assert(kReleased.slots() == 15, "memory | sink | local");
static_assert(kReleased.is_sink_block(0) && !kReleased.is_sink_block(1), "one block of sink");
static_assert(!kReleased.evicts(3) && kReleased.evicts(4), "blocks 1 to 3 fill the ring");
static_assert(kReleased.slot(kReleased.evicted_frame(4)) == kReleased.slot(kReleased.first_frame(4)),
              "overwritten in place");
static_assert(kReleased.shift(6) == 0 && kReleased.shift(7) == 3, "ids end at 20 from block 6 on");
static_assert(kReleased.temporal_id(7, kReleased.memory_frame(7)) == 9, "memory ids 9..11");

// 2^33 blocks in: beyond what 32 bits count.
constexpr int64_t kFar = int64_t{1} << 33;
static_assert(kReleased.temporal_id(kFar, kReleased.last_frame(kFar)) == 20, "the newest frame keeps the largest id");
static_assert(kReleased.temporal_id(kFar, kReleased.memory_frame(kFar)) == 9, "so does the memory its own");

}  // namespace

// Every method that takes a block, called from device code; out [12].
__global__ void ring_layout_of_block(echo::RingLayout layout, int64_t block, int64_t* out) {
  const int64_t last = layout.last_frame(block);
  const bool active = layout.memory_fits(block);
  out[0] = layout.first_frame(block);
  out[1] = last;
  out[2] = layout.is_sink_block(block);
  out[3] = layout.slot(last);
  out[4] = layout.evicts(block) ? layout.evicted_frame(block) : -1;
  out[5] = layout.oldest_local(block);
  out[6] = layout.local_filled(block);
  out[7] = layout.attended_begin(active);
  out[8] = layout.attended_end(block);
  out[9] = layout.shift(block);
  out[10] = layout.temporal_id(block, last);
  out[11] = layout.memory_frame(block);
}
