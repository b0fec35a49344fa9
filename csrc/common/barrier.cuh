// Hopper's barriers in shared memory (mbarrier) and the bulk copies that end at them, by intent.
//
// A barrier goes from phase to phase. A phase ends when as many threads have arrived as init() said and all bytes that
// it was told to expect are there; phases alternate in parity, the first is even. Threads that wait for a phase do not
// arrive: who fills a buffer arrives at one barrier and waits at another, who empties it does the reverse.
//
// The order of things: one thread calls init() and fence_async(); a barrier of the block; then everyone uses it. What
// a thread wrote before it arrived is seen by whoever waited for that phase. That holds for bulk copies too, which
// products may then read; of other copies and stores only what lies before a fence_async().

#pragma once

#include <cstdint>

#include "common/ptx.cuh"

namespace echo {

#if defined(ECHO_RT_EMULATED)

using emulation::Barrier;
using emulation::copy_bulk;
using emulation::fence_async;

#else

class Barrier {
 public:
  ECHO_DEVICE void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }

  ECHO_DEVICE void arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
#endif
  }

  // Arrives, and adds to what the phase waits for the bytes of bulk copies that are started behind this.
  ECHO_DEVICE void arrive_expecting(int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes)
                 : "memory");
#endif
  }

  // Returns when the latest phase of this parity has ended; at once before the first odd one.
  ECHO_DEVICE void wait(unsigned parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{.reg .pred over;\n"
        "again: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n}" ::"r"(address()),
        "r"(parity)
        : "memory");
#endif
  }

  ECHO_DEVICE uint32_t address() const { return detail::shared_address(&state_); }

 private:
  uint64_t state_;
};

// Starts one copy of `bytes`, a multiple of 16 as both addresses are, whose end the barrier's phase waits for.
ECHO_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Barrier& barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   detail::shared_address(shared)),
               "l"(global), "r"(bytes), "r"(barrier.address())
               : "memory");
#endif
}

// What this thread has written to shared memory, or seen written behind a barrier, is seen by products and bulk copies,
// which go another way to it than loads, stores and copy_async_16 do.
ECHO_DEVICE void fence_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#endif

// A place in a ring of stages, and the parity of its round, which is that of the phases of the stage's barriers.
template <int kStages>
struct Turn {
  int stage = 0;
  unsigned parity = 0;

  ECHO_DEVICE void advance() {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
  ECHO_DEVICE int before() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

}  // namespace echo
