// ring_layout.h with nothing but a C++ compiler: invariants over many windows, near the start and far beyond 2^31
// frames. test_ring_layout.py compares with an independent model; this one is for who builds with CMake and steps
// through.

#include "kv_ring/ring_layout.h"

#include <cstdio>
#include <cstdlib>

namespace {

int failed = 0;
int passed = 0;

void expect(bool holds, const char* what, const echo::RingLayout& layout, int64_t block) {
  if (holds) {
    ++passed;
    return;
  }
  ++failed;
  std::printf("block %lld of (%lld, %lld, %lld, %lld, %lld): %s\n", static_cast<long long>(block),
              static_cast<long long>(layout.frames_per_block), static_cast<long long>(layout.sink_frames),
              static_cast<long long>(layout.local_frames), static_cast<long long>(layout.memory_frames),
              static_cast<long long>(layout.max_temporal_id), what);
}

void check_block(const echo::RingLayout& layout, int64_t block) {
  const int64_t first = layout.first_frame(block);
  const int64_t last = layout.last_frame(block);
  const auto id = [&](int64_t frame) { return layout.temporal_id(block, frame); };

  expect(layout.slot(last) - layout.slot(first) == last - first, "a block is contiguous in the buffer", layout, block);
  expect(layout.slot(first) >= layout.memory_frames && layout.slot(last) < layout.slots(), "slots in range", layout,
         block);
  expect(layout.slot(last) < layout.attended_end(block), "a block attends to itself", layout, block);
  expect(layout.attended_end(block) <= layout.slots(), "attends within the buffer", layout, block);
  expect(id(last) >= 0 && id(last) <= layout.max_temporal_id, "ids stay in the trained range", layout, block);
  if (layout.is_sink_block(block)) return;
  expect(id(layout.oldest_local(block)) >= layout.sink_frames, "local ids keep clear of the sink's", layout, block);
  if (!layout.evicts(block)) return;
  expect(layout.slot(layout.evicted_frame(block)) == layout.slot(first), "overwrites in place", layout, block);
  expect(layout.local_filled(block) == layout.local_frames, "evicts only from a full ring", layout, block);
  expect(layout.memory_frames == 0 || layout.memory_fits(block), "from the first eviction on the memory fits", layout,
         block);
}

}  // namespace

int main() {
  for (int64_t per_block = 1; per_block <= 4; ++per_block) {
    for (int64_t sink = 0; sink <= 3; ++sink) {
      for (int64_t local = 1; local <= 5; ++local) {
        for (int64_t memory = 0; memory <= (sink == 0 ? 0 : per_block); ++memory) {
          const int64_t needed = (sink + local) * per_block + memory;
          for (int64_t spare = 0; spare <= 4; ++spare) {
            const int64_t max_id = needed - 1 + spare;
            if (max_id < 1) continue;
            const echo::RingLayout layout{per_block, sink * per_block, local * per_block, memory, max_id};
            for (int64_t block = 0; block < 40; ++block) check_block(layout, block);
            for (int64_t block = 0; block < 10; ++block) check_block(layout, (int64_t{1} << 40) + block);
          }
        }
      }
    }
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
