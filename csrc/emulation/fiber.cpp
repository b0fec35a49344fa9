// See fiber.h. Host assembly stands here and nowhere else.

#include "emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#if defined(ECHO_RT_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace echo::emulation {

namespace {

#if defined(ECHO_RT_ADDRESS_SANITIZER)
constexpr size_t kStackBytes = 512 << 10;  // red zones around every local variable
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

// Stacks that start at one offset of their pages would share a few lines of the first-level cache: spread them.
constexpr size_t kStackColours = 24, kColourBytes = 320;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

#if defined(ECHO_RT_ADDRESS_SANITIZER)
thread_local Fiber* left_fiber = nullptr;

void before_switch(Fiber& from, Fiber& to, bool from_ends) {
  left_fiber = &from;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.sanitizer_state, to.stack_low, to.stack_bytes);
}

void after_switch(Fiber* self) {
  const void* low;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self ? self->sanitizer_state : nullptr, &low, &bytes);
  left_fiber->stack_low = low;
  left_fiber->stack_bytes = bytes;
}
#else
void before_switch(Fiber&, Fiber&, bool) {}
void after_switch(Fiber*) {}
#endif

thread_local void (*entry_point)() = nullptr;

[[noreturn]] void first_frame() {
  after_switch(nullptr);
  entry_point();
  __builtin_unreachable();
}

}  // namespace

#if !defined(ECHO_RT_EMULATION_UCONTEXT)

// Saves what a called function must preserve on the stack that is left, and its pointer in *left; then the reverse on
// the stack that is entered. Floating-point control is not changed by kernels and stays.
extern "C" void echo_rt_switch_stacks(void** left, void* entered);

#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .type echo_rt_switch_stacks, @function
  .hidden echo_rt_switch_stacks
  .globl echo_rt_switch_stacks
echo_rt_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size echo_rt_switch_stacks, .-echo_rt_switch_stacks
)");
constexpr size_t kReturnWord = 6, kFrameWords = 8;
#else
asm(R"(
  .text
  .p2align 4
  .type echo_rt_switch_stacks, %function
  .hidden echo_rt_switch_stacks
  .globl echo_rt_switch_stacks
echo_rt_switch_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size echo_rt_switch_stacks, .-echo_rt_switch_stacks
)");
constexpr size_t kReturnWord = 11, kFrameWords = 20;
#endif

void prepare(Fiber& fiber, void (*entry)()) {
  entry_point = entry;
  const auto top = reinterpret_cast<uintptr_t>(fiber.stack_low) + fiber.stack_bytes;
  auto* frame = reinterpret_cast<uintptr_t*>(top & ~uintptr_t{63}) - kFrameWords;
  // Zeros end the chain of frames for a debugger.
  for (size_t i = 0; i < kFrameWords; ++i) frame[i] = 0;
  frame[kReturnWord] = reinterpret_cast<uintptr_t>(&first_frame);
  fiber.stack_pointer = frame;
}

void switch_fibers(Fiber& from, Fiber& to, bool from_ends) {
  before_switch(from, to, from_ends);
  echo_rt_switch_stacks(&from.stack_pointer, to.stack_pointer);
  after_switch(&from);
}

#else

void prepare(Fiber& fiber, void (*entry)()) {
  entry_point = entry;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.stack_low);
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, first_frame, 0);
}

void switch_fibers(Fiber& from, Fiber& to, bool from_ends) {
  before_switch(from, to, from_ends);
  swapcontext(&from.context, &to.context);
  after_switch(&from);
}

#endif

StackPool::~StackPool() { release(); }

void StackPool::release() {
  const size_t bytes = count_ * (kStackBytes + page_bytes());
#if defined(ECHO_RT_ADDRESS_SANITIZER)
  __asan_unpoison_memory_region(base_, bytes);
#endif
  if (base_ != nullptr) munmap(base_, bytes);
  base_ = nullptr;
  count_ = 0;
}

bool StackPool::grow(size_t count) {
  release();
  const size_t page = page_bytes(), pitch = kStackBytes + page;
  // Pages cost memory only once a kernel has touched them.
  void* mapping = mmap(nullptr, count * pitch, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return false;
  base_ = static_cast<char*>(mapping);
  count_ = count;
  for (size_t i = 0; i < count; ++i) {
    if (mprotect(base_ + i * pitch, page, PROT_NONE) != 0) return false;
  }
  return true;
}

bool StackPool::assign(size_t count, Fiber* const* fibers) {
  if (count > count_ && !grow(count)) return false;
  const size_t page = page_bytes(), pitch = kStackBytes + page;
  for (size_t i = 0; i < count; ++i) {
    fibers[i]->stack_low = base_ + i * pitch + page;
    fibers[i]->stack_bytes = kStackBytes - (i % kStackColours) * kColourBytes;
#if defined(ECHO_RT_ADDRESS_SANITIZER)
    // A kernel that failed was left in the middle, its frames still fenced.
    __asan_unpoison_memory_region(base_ + i * pitch + page, kStackBytes);
#endif
  }
  return true;
}

}  // namespace echo::emulation
