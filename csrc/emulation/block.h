// One block of threads on one host thread: who runs, who waits for whom, and the block's shared memory.
//
// A kernel's mistake (a barrier that not all reach, shared memory overrun, a misaligned 16-byte access ...) ends the
// block; the launch then returns an error code, and last_error() says what happened, where, and under which seed.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "emulation/fiber.h"
#include "emulation/types.h"

namespace echo::emulation {

inline constexpr int kWarpSize = 32;

// What the largest supported GPUs offer a block, static and dynamic together, and static alone.
inline constexpr size_t kMaxSharedBytes = 227 << 10;
inline constexpr size_t kMaxStaticSharedBytes = 48 << 10;
inline constexpr unsigned int kMaxThreads = 1024;

// Threads run in another order for every seed: first ECHO_RT_EMULATION_SEED (0 where it is not set).
void set_seed(uint64_t seed);
uint64_t seed();

// Why the latest launch of this host thread failed; empty after one that did not, and once it has been taken.
const std::string& last_error();
std::string take_last_error();

// A line of a kernel, for messages.
struct Site {
  const char* file;
  int line;
};

enum class Operation : uint8_t {
  kNone,
  kSyncThreads,
  kSyncWarp,
  kShuffle,
  kVote,
  kLoadMatrix,
  kMultiply,
  kWarpgroupMultiply,
  kBarrier
};

// What a lane brings to a collective, and then what it takes from it.
struct alignas(16) Deposit {
  uint32_t words[8];
};

// Lanes of a warp that meet in one operation. Each meeting has its own deposits, so that a lane that runs ahead to the
// next one overwrites nothing.
struct Meeting {
  uint32_t expected = 0, arrived = 0, taken = 0;
  Operation operation = Operation::kNone;
  Site site = {nullptr, 0};
  void (*combine)(Meeting&) = nullptr;
  Deposit deposits[kWarpSize];
};

struct Thread;

struct Warp {
  uint32_t lanes = 0;
  Thread* threads[kWarpSize] = {};
  std::vector<Meeting*> open, spare;
  std::vector<float> operand;  // of a warpgroup's product, widened: here, as an error leaves whoever works on it
};

// A copy that was issued, of zeros where from is null: it happens when it is waited for.
struct PendingCopy {
  void* to;
  const void* from;
  size_t bytes;
};

// What an mbarrier stands for. `unfenced`: in this phase somebody arrived with copies that products cannot see yet;
// over_unfenced is that of the phase before, which who waits for it takes over.
struct BarrierState {
  const void* at = nullptr;
  const Thread* initialized_by = nullptr;  // until that thread's fence
  int arrivals = 0, missing_arrivals = 0;
  int64_t missing_bytes = 0;
  uint64_t phase = 0;
  bool unfenced = false, over_unfenced = false;
  std::vector<PendingCopy> copies;  // bulk copies on their way
  std::vector<Thread*> waiting;
};

// An operand of a warpgroup's product in shared memory: see common/warpgroup.cuh.
struct Operand {
  const unsigned char* start = nullptr;
  int depth_stride = 0, row_stride = 0;
};

// Accumulators that products of a warpgroup are added to: their values until they come home.
struct SumsInFlight {
  float* home;
  std::vector<float> values;
};

// A product of a warpgroup that was issued: it happens when it is waited for.
struct PendingProduct {
  SumsInFlight* sums;
  int columns, first_row;
  Operand a, b;
  Site site;
  void (*run)(Meeting&);
};

struct Thread {
  Fiber fiber;
  uint3 index = {0, 0, 0};
  int lane = 0;
  Warp* warp = nullptr;
  Operation waits_in = Operation::kNone;
  Site waits_at = {nullptr, 0};
  bool ended = false;
  std::vector<PendingCopy> copies;
  std::vector<size_t> group_ends;
  // Of the warpgroup's products: whether copies that this thread knows of could not be seen by them yet, whether any
  // may be issued, those that were.
  bool writes_unfenced = false, products_begun = false;
  std::vector<PendingProduct> products;
  std::vector<size_t> product_ends;
  std::vector<std::unique_ptr<SumsInFlight>> sums;
};

// One for each ECHO_SHARED of each instantiation: its address is the allocation's key.
struct SharedKey {
  const char* name;
  Site site;
};

struct Block {
  dim3 grid, size;
  uint3 index = {0, 0, 0};
  size_t dynamic_bytes = 0;
  std::vector<std::unique_ptr<BarrierState>> barriers;
};

// The thread that runs now and the block it belongs to; null outside a kernel. threadIdx is read all the time:
// __thread, unlike thread_local, needs no check for a constructor, and initial-exec no call in a shared library.
extern __thread Thread* current_thread __attribute__((tls_model("initial-exec")));
extern __thread Block* current_block __attribute__((tls_model("initial-exec")));

// Ends the block with this message.
[[noreturn]] void fail(std::string message);

void sync_threads(Site site);

// Lets the others run until wake() was called for the running thread.
void wait_until_woken(Operation operation, Site site);
void wake(Thread& thread);
// Lets the others run until none of them can go on; or not, as is drawn where all threads of the block set out.
void stand_back();
// One of the bulk copies that a thread waits for happens, as `choice` says; false where there is none.
bool land(size_t choice);

// Registers the running lane at the meeting of mask, and waits there: the last lane to come runs combine first.
Meeting& meet(uint32_t mask, Operation operation, Site site, const Deposit& deposit,
              void (*combine)(Meeting&) = nullptr);
// The running lane needs the meeting's deposits no longer.
void leave(Meeting& meeting);

void* static_shared(const SharedKey& key, size_t bytes, size_t alignment);
void* dynamic_shared_bytes(size_t bytes, size_t alignment);
// Fails unless [address, address + bytes) lies in one allocation of the block's shared memory.
void check_shared(const void* address, size_t bytes, const char* operation);
void fail_misaligned(const char* operation, size_t alignment);

inline void check_aligned(const void* address, size_t alignment, const char* operation) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail_misaligned(operation, alignment);
}

// Runs body(arguments) as every thread of every block.
cudaError_t run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*body)(const void*),
                     const void* arguments);

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                   Arguments&&... arguments) {
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{kernel, std::tuple<Parameters...>{std::forward<Arguments>(arguments)...}};
  const auto body = [](const void* opaque) {
    const Call& the_call = *static_cast<const Call*>(opaque);
    std::apply(the_call.first, the_call.second);
  };
  return run_grid(grid, block, dynamic_shared_bytes, body, &call);
}

}  // namespace echo::emulation
