// Fibers: stacks on one host thread, changed between without a system call.

#pragma once

#include <cstddef>
#include <vector>

#if !(defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))) && !defined(ECHO_RT_EMULATION_UCONTEXT)
#define ECHO_RT_EMULATION_UCONTEXT
#endif
#if defined(ECHO_RT_EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define ECHO_RT_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ECHO_RT_ADDRESS_SANITIZER
#endif
#endif

namespace echo::emulation {

// A stack and where it was left. The fiber of the host thread itself has no stack of ours: its bounds are learned by
// the sanitizer at the first switch.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack_low = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer_state = nullptr;
#if defined(ECHO_RT_EMULATION_UCONTEXT)
  ucontext_t context;
#endif
};

// Makes the next switch to fiber call entry on an empty stack. entry must not return.
void prepare(Fiber& fiber, void (*entry)());

// Leaves from, continues to. Returns when something switches to from; never, where from has ended.
void switch_fibers(Fiber& from, Fiber& to, bool from_ends = false);

// Stacks, one mapping, each above a page that cannot be touched: an overflow stops the process instead of writing
// into a neighbour.
class StackPool {
 public:
  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool();

  // Gives each of the fibers a stack. False where the memory cannot be had.
  bool assign(size_t count, Fiber* const* fibers);

 private:
  bool grow(size_t count);
  void release();

  char* base_ = nullptr;
  size_t count_ = 0;
};

}  // namespace echo::emulation
