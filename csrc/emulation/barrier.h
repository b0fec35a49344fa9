// mbarrier and cp.async.bulk on the host. common/barrier.cuh says what they mean on a GPU.
//
// A bulk copy happens as late as it can: when a thread waits for it and nobody of the block can go on. Until then its
// target is poisoned, so that whoever reads it early gets NaN, and whoever still reads what was there before does too.

#pragma once

#include <cstdint>

#include "emulation/block.h"

namespace echo::emulation {

class Barrier {
 public:
  void init(int arrivals);
  void arrive();
  void arrive_expecting(int bytes);
  void wait(unsigned parity, const char* file = __builtin_FILE(), int line = __builtin_LINE());

 private:
  uint64_t state_;  // the bytes that it takes; what it stands for is the block's
};

void copy_bulk(void* to, const void* from, int bytes, Barrier& barrier);

void fence_async();

}  // namespace echo::emulation
