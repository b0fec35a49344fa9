// See barrier.h.

#include "emulation/barrier.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "emulation/tensor_core.h"

namespace echo::emulation {

namespace {

constexpr int kBulkUnit = 16, kMaxBulkBytes = (1 << 20) - 1;

BarrierState& state_of(const Barrier* barrier, const char* operation) {
  for (const auto& state : current_block->barriers) {
    if (state->at == barrier) return *state;
  }
  fail(std::string(operation) + " an mbarrier that is not initialized");
}

[[noreturn]] void fail_unexpected() { fail("a bulk copy ends at an mbarrier that nobody told to expect its bytes"); }

// Ends the phase if nothing is missing.
void end_phase(BarrierState& state) {
  if (state.missing_arrivals > 0 || state.missing_bytes != 0) return;
  if (!state.copies.empty()) fail_unexpected();
  ++state.phase;
  state.missing_arrivals = state.arrivals;
  state.over_unfenced = std::exchange(state.unfenced, false);
  for (Thread* thread : state.waiting) wake(*thread);
  state.waiting.clear();
}

}  // namespace

void Barrier::init(int arrivals) {
  check_shared(this, sizeof *this, "an mbarrier");
  if (arrivals < 1) fail("an mbarrier that is initialized for no arrivals");
  for (const auto& state : current_block->barriers) {
    if (state->at == this) fail("an mbarrier that is initialized twice");
  }
  auto state = std::make_unique<BarrierState>();
  state->at = this;
  state->initialized_by = current_thread;
  state->arrivals = state->missing_arrivals = arrivals;
  current_block->barriers.push_back(std::move(state));
}

void Barrier::arrive() { arrive_expecting(0); }

void Barrier::arrive_expecting(int bytes) {
  BarrierState& state = state_of(this, "an arrival at");
  state.unfenced |= current_thread->writes_unfenced;
  state.missing_bytes += bytes;
  if (state.missing_arrivals == 0) fail("more threads arrive in a phase of an mbarrier than it was initialized for");
  --state.missing_arrivals;
  end_phase(state);
}

void Barrier::wait(unsigned parity, const char* file, int line) {
  BarrierState& state = state_of(this, "waiting for");
  Thread& self = *current_thread;
  if (parity > 1) fail("waiting for an mbarrier's phase of parity " + std::to_string(parity));
  while ((state.phase & 1) == parity) {
    state.waiting.push_back(&self);
    wait_until_woken(Operation::kBarrier, {file, line});
  }
  self.writes_unfenced |= state.over_unfenced;
}

void copy_bulk(void* to, const void* from, int bytes, Barrier& barrier) {
  BarrierState& state = state_of(&barrier, "a bulk copy that ends at");
  if (state.initialized_by != nullptr) {
    fail("a bulk copy that ends at an mbarrier behind whose initialization its thread did not call fence.proxy.async");
  }
  if (bytes < kBulkUnit || bytes % kBulkUnit != 0 || bytes > kMaxBulkBytes) {
    fail("a bulk copy of " + std::to_string(bytes) + " bytes, which are no multiple of 16 up to 2^20 - 16");
  }
  check_shared(to, static_cast<size_t>(bytes), "a bulk copy to a target");
  check_aligned(to, kBulkUnit, "a bulk copy to a target");
  check_aligned(from, kBulkUnit, "a bulk copy from a source");
  std::memset(to, 0xFF, static_cast<size_t>(bytes));
  state.copies.push_back({to, from, static_cast<size_t>(bytes)});
}

void fence_async() {
  current_thread->writes_unfenced = false;
  for (const auto& state : current_block->barriers) {
    if (state->initialized_by == current_thread) state->initialized_by = nullptr;
  }
}

bool land(size_t choice) {
  const auto awaited = [](const auto& state) { return !state->waiting.empty() && !state->copies.empty(); };
  auto& barriers = current_block->barriers;
  const auto many = static_cast<size_t>(std::count_if(barriers.begin(), barriers.end(), awaited));
  if (many == 0) return false;
  auto chosen = std::find_if(barriers.begin(), barriers.end(), awaited);
  for (size_t i = choice % many; i > 0; --i) chosen = std::find_if(chosen + 1, barriers.end(), awaited);
  BarrierState& state = **chosen;
  std::swap(state.copies[choice / many % state.copies.size()], state.copies.back());
  const PendingCopy copy = state.copies.back();
  state.copies.pop_back();
  perform(copy);
  state.missing_bytes -= static_cast<int64_t>(copy.bytes);
  if (state.missing_bytes < 0) fail_unexpected();
  end_phase(state);
  return true;
}

}  // namespace echo::emulation
