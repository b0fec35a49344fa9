// See block.h.

#include "emulation/block.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <numeric>
#include <utility>

#include "emulation/random.h"
#include "emulation/report.h"
#include "emulation/shared_memory.h"

namespace echo::emulation {

__thread Thread* current_thread __attribute__((tls_model("initial-exec"))) = nullptr;
__thread Block* current_block __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

uint64_t seed_of_environment() {
  const char* text = std::getenv("ECHO_RT_EMULATION_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

std::atomic<uint64_t>& the_seed() {
  static std::atomic<uint64_t> value{seed_of_environment()};
  return value;
}

// Everything a host thread needs to run blocks, kept from launch to launch.
class Engine {
 public:
  cudaError_t run(dim3 grid, dim3 size, size_t dynamic_bytes, void (*body)(const void*), const void* arguments);

  void park();
  [[noreturn]] void end_block(std::string message);
  void arrive_at_block_barrier(Site site);
  void wait_until_woken(Operation operation, Site site);
  void wake(Thread* thread) { woken_.push_back(thread); }
  void stand_back() {
    if (!stands_back_) return;
    late_.push_back(current_thread);
    park();
  }
  Meeting& arrive(uint32_t mask, Operation operation, Site site, const Deposit& deposit, void (*combine)(Meeting&));
  void leave(Meeting& meeting);

  SharedMemory shared;
  std::string error;

 private:
  bool make_threads(dim3 size);
  void start_block();
  void check_block();
  void wake_block();
  Thread* next_thread();
  void run_thread();
  [[noreturn]] void refuse(Operation operation, Site site, const Meeting* pending);
  [[noreturn]] void refuse_barrier(Site site);
  std::string where() const;
  static void thread_entry();

  Fiber host_;
  StackPool stacks_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<std::unique_ptr<Warp>> warps_;
  std::vector<std::unique_ptr<Meeting>> meetings_;
  size_t thread_count_ = 0, ended_ = 0;
  std::vector<Thread*> ready_, woken_, late_;
  std::vector<const Warp*> warp_order_;
  bool depth_first_ = false, stands_back_ = false;
  size_t at_barrier_ = 0;
  bool writes_unfenced_ = false;  // by any thread at the barrier
  Site barrier_site_ = {nullptr, 0};

  Block block_;
  Random random_{0};
  void (*body_)(const void*) = nullptr;
  const void* arguments_ = nullptr;
};

// Behind a pointer: a library's thread-local bytes are few where some of them are initial-exec.
Engine& engine() {
  thread_local std::unique_ptr<Engine> instance = std::make_unique<Engine>();
  return *instance;
}

// The engine whose block runs on this thread: reached without the check whether it has been constructed.
__thread Engine* running __attribute__((tls_model("initial-exec"))) = nullptr;

// ---- threads

bool Engine::make_threads(dim3 size) {
  thread_count_ = size_t{size.x} * size.y * size.z;
  while (threads_.size() < thread_count_) threads_.push_back(std::make_unique<Thread>());
  const size_t warp_count = (thread_count_ + kWarpSize - 1) / kWarpSize;
  while (warps_.size() < warp_count) warps_.push_back(std::make_unique<Warp>());
  for (size_t i = 0; i < warp_count; ++i) {
    const size_t lanes = std::min<size_t>(kWarpSize, thread_count_ - i * kWarpSize);
    warps_[i]->lanes = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    for (size_t lane = 0; lane < lanes; ++lane) warps_[i]->threads[lane] = threads_[i * kWarpSize + lane].get();
  }
  std::vector<Fiber*> fibers;
  for (size_t i = 0; i < thread_count_; ++i) {
    Thread& thread = *threads_[i];
    const auto rank = static_cast<unsigned>(i);
    thread.index = {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
    thread.lane = static_cast<int>(i % kWarpSize);
    thread.warp = warps_[i / kWarpSize].get();
    fibers.push_back(&thread.fiber);
  }
  return stacks_.assign(thread_count_, fibers.data());
}

void Engine::thread_entry() { running->run_thread(); }

void Engine::run_thread() {
  std::string thrown;
  try {
    body_(arguments_);
  } catch (const std::exception& problem) {
    thrown = std::string("the kernel threw: ") + problem.what();
  }
  // Not from the handler, which would never be left.
  if (!thrown.empty()) end_block(std::move(thrown));
  Thread& self = *current_thread;
  if (!self.copies.empty()) {
    end_block(std::to_string(self.copies.size()) + " asynchronous copies were issued and never waited for");
  }
  if (!self.products.empty()) {
    end_block(std::to_string(self.products.size()) + " products of a warpgroup were issued and never waited for");
  }
  self.ended = true;
  ++ended_;
  Thread* next = next_thread();
  current_thread = next;
  switch_fibers(self.fiber, next == nullptr ? host_ : next->fiber, true);
  __builtin_unreachable();
}

// Lets every thread of the block go on: where it starts, and where all have met. How is drawn each time. In rounds,
// each thread that can runs once, in fresh order, so that warps keep step but for a few instructions. Depth first,
// those that were released last go on first, so that one warp runs up to the next barrier of the block before another
// one starts: most of what a missing barrier allows shows itself then.
void Engine::wake_block() {
  depth_first_ = random_.below(4) != 0;
  stands_back_ = random_.below(2) != 0;
  if (!depth_first_) {
    for (size_t i = 0; i < thread_count_; ++i) wake(threads_[i].get());
    return;
  }
  const size_t warp_count = (thread_count_ + kWarpSize - 1) / kWarpSize;
  warp_order_.resize(warp_count);
  for (size_t i = 0; i < warp_count; ++i) warp_order_[i] = warps_[i].get();
  random_.shuffle(warp_order_.data(), warp_count);
  for (const Warp* warp : warp_order_) {
    const size_t first = ready_.size();
    for (uint32_t rest = warp->lanes; rest != 0; rest &= rest - 1) ready_.push_back(warp->threads[__builtin_ctz(rest)]);
    random_.shuffle(ready_.data() + first, ready_.size() - first);
  }
}

Thread* Engine::next_thread() {
  // Nobody can go on: something of what was put off happens.
  while (ready_.empty() && woken_.empty()) {
    if ((late_.empty() || random_.below(2) == 0) && land(random_.next())) continue;
    if (late_.empty()) break;
    woken_.swap(late_);
  }
  if (!woken_.empty() && (depth_first_ || ready_.empty())) {
    random_.shuffle(woken_.data(), woken_.size());
    ready_.insert(ready_.end(), woken_.begin(), woken_.end());
    woken_.clear();
  }
  if (ready_.empty()) return nullptr;
  Thread* next = ready_.back();
  ready_.pop_back();
  return next;
}

void Engine::park() {
  Thread* self = current_thread;
  Thread* next = next_thread();
  if (next == self) return;
  current_thread = next;
  switch_fibers(self->fiber, next == nullptr ? host_ : next->fiber);
}

std::string Engine::where() const {
  return "; " + place("block", block_.index.x, block_.index.y, block_.index.z) + ", seed " + std::to_string(seed());
}

// Nothing on this stack is destroyed: whatever owns memory must have been moved out of it.
void Engine::end_block(std::string message) {
  Thread* self = current_thread;
  error = std::move(message);
  error += "; " + place(*self) + where();
  current_thread = nullptr;
  switch_fibers(self->fiber, host_, true);
  __builtin_unreachable();
}

// ---- barriers and collectives

void Engine::arrive_at_block_barrier(Site site) {
  if (at_barrier_ == 0) barrier_site_ = site;
  // One barrier in hardware, but two in the program: it was reached in divergent code.
  if (!same(barrier_site_, site)) refuse_barrier(site);
  writes_unfenced_ |= current_thread->writes_unfenced;
  if (++at_barrier_ == thread_count_) {
    at_barrier_ = 0;
    // What one thread has not fenced, the others now know of and have not either.
    for (size_t i = 0; writes_unfenced_ && i < thread_count_; ++i) threads_[i]->writes_unfenced = true;
    writes_unfenced_ = false;
    wake_block();
  }
  wait_until_woken(Operation::kSyncThreads, site);
}

void Engine::wait_until_woken(Operation operation, Site site) {
  Thread& self = *current_thread;
  self.waits_in = operation;
  self.waits_at = site;
  park();
  self.waits_in = Operation::kNone;
}

// Apart from arrive, whose frame is then small: every lane goes through it all the time.
[[gnu::noinline, gnu::cold]] void Engine::refuse(Operation operation, Site site, const Meeting* pending) {
  std::string message = std::string(name_of(operation)) + " at " + place(site);
  if (pending == nullptr) {
    message += " whose mask lacks lane " + std::to_string(current_thread->lane) + ", which calls it";
  } else {
    message += std::string(" while lanes of its mask wait in ") + name_of(pending->operation) + " at " +
               place(pending->site) + " with the mask " + std::to_string(pending->expected);
  }
  end_block(std::move(message));
}

[[gnu::noinline, gnu::cold]] void Engine::refuse_barrier(Site site) {
  end_block("__syncthreads at " + place(site) + " while other threads wait in the one at " + place(barrier_site_));
}

Meeting& Engine::arrive(uint32_t mask, Operation operation, Site site, const Deposit& deposit,
                        void (*combine)(Meeting&)) {
  Thread& self = *current_thread;
  Warp& warp = *self.warp;
  const uint32_t bit = 1u << self.lane, expected = mask & warp.lanes;
  if ((mask & bit) == 0) refuse(operation, site, nullptr);
  Meeting* meeting = nullptr;
  for (Meeting* other : warp.open) {
    if ((other->expected & expected) == 0) continue;
    // Lanes may come to a __syncwarp from different places; everything else is one instruction of the warp.
    const bool same_call = operation == Operation::kSyncWarp || (other->combine == combine && same(other->site, site));
    if (other->expected != expected || other->operation != operation || !same_call) refuse(operation, site, other);
    meeting = other;
    break;
  }
  if (meeting == nullptr) {
    if (warp.spare.empty()) {
      meetings_.push_back(std::make_unique<Meeting>());
      warp.spare.push_back(meetings_.back().get());
    }
    meeting = warp.spare.back();
    warp.spare.pop_back();
    warp.open.push_back(meeting);
    meeting->expected = expected;
    meeting->arrived = meeting->taken = 0;
    meeting->operation = operation;
    meeting->site = site;
    meeting->combine = combine;
  }
  meeting->deposits[self.lane] = deposit;
  meeting->arrived |= bit;
  self.waits_in = operation;
  self.waits_at = site;
  if (meeting->arrived == expected) {
    warp.open.erase(std::find(warp.open.begin(), warp.open.end(), meeting));
    if (combine != nullptr) combine(*meeting);
    for (uint32_t rest = expected; rest != 0; rest &= rest - 1) wake(warp.threads[__builtin_ctz(rest)]);
  }
  park();
  self.waits_in = Operation::kNone;
  return *meeting;
}

void Engine::leave(Meeting& meeting) {
  meeting.taken |= 1u << current_thread->lane;
  if (meeting.taken == meeting.expected) current_thread->warp->spare.push_back(&meeting);
}

void Engine::start_block() {
  ready_.clear();
  woken_.clear();
  late_.clear();
  at_barrier_ = ended_ = 0;
  writes_unfenced_ = false;
  block_.barriers.clear();
  shared.start_block(block_.dynamic_bytes);
  for (size_t i = 0; i < thread_count_; ++i) {
    Thread& thread = *threads_[i];
    prepare(thread.fiber, &Engine::thread_entry);
    thread.waits_in = Operation::kNone;
    thread.ended = false;
    thread.copies.clear();
    thread.group_ends.clear();
    thread.writes_unfenced = thread.products_begun = false;
    thread.products.clear();
    thread.product_ends.clear();
    thread.sums.clear();
  }
  wake_block();
}

void Engine::check_block() {
  const bool all_ended = ended_ == thread_count_;
  error = all_ended ? shared.describe_overrun() : describe_deadlock(threads_, thread_count_);
  if (error.empty()) error = describe_forgotten(block_);
  if (!error.empty()) error += where();
}

cudaError_t Engine::run(dim3 grid, dim3 size, size_t dynamic_bytes, void (*body)(const void*), const void* arguments) {
  if (running != nullptr) end_block("a kernel launched a kernel");
  error = describe_refusal(grid, size, dynamic_bytes);
  if (!error.empty()) return cudaErrorInvalidConfiguration;
  if (!make_threads(size)) {
    error = "no memory for the stacks of " + std::to_string(thread_count_) + " threads";
    return cudaErrorLaunchFailure;
  }
  block_.grid = grid;
  block_.size = size;
  block_.dynamic_bytes = dynamic_bytes;
  body_ = body;
  arguments_ = arguments;
  random_.state = seed();

  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  random_.shuffle(order.data(), order.size());
  running = this;
  current_block = &block_;
  for (uint64_t rank : order) {
    block_.index = {static_cast<unsigned>(rank % grid.x), static_cast<unsigned>(rank / grid.x % grid.y),
                    static_cast<unsigned>(rank / (uint64_t{grid.x} * grid.y))};
    start_block();
    Thread* first = next_thread();
    current_thread = first;
    switch_fibers(host_, first->fiber);
    if (error.empty()) check_block();
    if (!error.empty()) break;
  }
  running = nullptr;
  current_thread = nullptr;
  current_block = nullptr;
  if (error.empty()) return cudaSuccess;
  // Lanes that were left in the middle hold meetings: forget them all.
  for (const auto& warp : warps_) {
    warp->open.clear();
    warp->spare.clear();
  }
  meetings_.clear();
  return cudaErrorLaunchFailure;
}

}  // namespace

// ---- what kernels and launches see

void set_seed(uint64_t seed) { the_seed() = seed; }

uint64_t seed() { return the_seed(); }

const std::string& last_error() { return engine().error; }

std::string take_last_error() { return std::exchange(engine().error, {}); }

void fail(std::string message) {
  if (running == nullptr) std::abort();  // called outside a kernel: there is no launch to fail
  running->end_block(std::move(message));
}

void sync_threads(Site site) { running->arrive_at_block_barrier(site); }

Meeting& meet(uint32_t mask, Operation operation, Site site, const Deposit& deposit, void (*combine)(Meeting&)) {
  return running->arrive(mask, operation, site, deposit, combine);
}

void leave(Meeting& meeting) { running->leave(meeting); }

void wait_until_woken(Operation operation, Site site) { running->wait_until_woken(operation, site); }

void wake(Thread& thread) { running->wake(&thread); }

void stand_back() { running->stand_back(); }

void* static_shared(const SharedKey& key, size_t bytes, size_t alignment) {
  void* object = running->shared.static_object(key, bytes, alignment);
  if (object == nullptr) fail(running->shared.refusal());
  return object;
}

void* dynamic_shared_bytes(size_t bytes, size_t alignment) {
  void* object = running->shared.dynamic_object(bytes, alignment);
  if (object == nullptr) fail(running->shared.refusal());
  return object;
}

void check_shared(const void* address, size_t bytes, const char* operation) {
  if (!running->shared.contains(address, bytes)) {
    fail(std::string(operation) + " of " + std::to_string(bytes) + " bytes that do not lie in shared memory");
  }
}

void fail_misaligned(const char* operation, size_t alignment) {
  fail(std::string(operation) + " at an address that is not a multiple of " + std::to_string(alignment));
}

cudaError_t run_grid(dim3 grid, dim3 block, size_t dynamic_shared_bytes, void (*body)(const void*),
                     const void* arguments) {
  return engine().run(grid, block, dynamic_shared_bytes, body, arguments);
}

}  // namespace echo::emulation
