// When the work of the streams runs: at once, when somebody waits, or by chance.
#pragma once

#include "machine.h"

namespace virtual_gpu {

enum class Policy {
  kEager,   // at once, in the order of the calls: what a GPU does that is quick
  kLazy,    // only what somebody waits for, and only then: what a GPU does that is slow
  kRandom,  // by chance, within what streams and events allow
};

// From then on, for all streams; what is queued is finished first.
void choose_policy(Policy policy, unsigned seed);
Policy policy(const Lock&);

// The next number of the seeded sequence, below `limit`.
size_t chance(const Lock&, size_t limit);

// Appends to a stream's queue, or to the graph that it is being captured into.
cudaError_t submit(cudaStream_t stream, Item item);

// Appends to a queue and gives the policy its turn. The lock is released.
void enqueue(Lock lock, Stream& stream, std::vector<Item> items);

// Appends a record or a wait. No work runs for it on the caller's thread (see go_on_beside).
void enqueue_mark(const Lock&, Stream& stream, Item mark);

// Block until all that was asked of the device, or of one stream, is done, or one record of an event is passed. The
// lock is released, and so is Python's interpreter lock. The result is the device's fault, if it has one.
cudaError_t wait_for_all(Lock lock);
cudaError_t wait_for(Lock lock, Stream& stream);
cudaError_t wait_for(Lock lock, std::shared_ptr<Record> record);

// Lets the device go on beside the caller, who is only asking. Nothing runs on the caller's thread: torch asks while it
// holds its allocator's lock, which the thread that holds the interpreter may be waiting for.
void go_on_beside(const Lock&);

bool idle(const Stream& stream);

}  // namespace virtual_gpu
