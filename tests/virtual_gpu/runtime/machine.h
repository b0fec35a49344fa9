// What the virtual GPU is made of: streams with their queues of work, events, captures and graphs.
//
// One mutex guards all of it. A function that takes a `Lock` needs it held; work itself runs, and is thrown away,
// without it: it may wait for Python's interpreter lock, whose holder may be waiting for this one.
#pragma once

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

// The library's own symbols are hidden; what torch would find in CUDA's runtime is not.
#define VIRTUAL_GPU_API extern "C" __attribute__((visibility("default")))

namespace virtual_gpu {

using Lock = std::unique_lock<std::mutex>;

// Computes one item on the host; false says that it failed.
using Work = std::function<bool()>;

// Memory that an item reads or writes, which must still be allocated when it runs.
struct Range {
  const void* begin;
  size_t bytes;
};

// One record of an event. An event that is recorded again has another: who waits already waits for the one before.
struct Record {
  bool passed = false;
  double milliseconds = 0;  // when
};

struct Item {
  enum class Kind { kWork, kRecord, kWait };

  Kind kind = Kind::kWork;
  std::string name;
  Work work;
  std::vector<Range> memory;
  std::shared_ptr<Record> record;  // what a record passes, or a wait needs
};

// An item of a graph, with the indices of those that it comes after.
struct Node {
  Item item;
  std::set<size_t> after;
};

struct Graph {
  std::vector<Node> nodes;
};

struct Stream;

// A capture under way. It spreads to streams that wait for an event recorded in it.
struct Capture {
  uint64_t id = 0;
  Stream* origin = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id owner;
  bool invalid = false;
  bool ended = false;
  std::set<Stream*> members;
  Graph graph;
};

struct Stream {
  int priority = 0;
  std::deque<Item> queue;
  bool running = false;              // an item of it has been taken and is not done
  std::shared_ptr<Capture> capture;  // the one it takes part in
  std::set<size_t> latest;           // in a capture: the nodes that the next one comes after
};

struct Event {
  unsigned flags = 0;
  std::shared_ptr<Record> record;    // the last one, if there is one
  std::shared_ptr<Capture> capture;  // the one it was last recorded in
  std::set<size_t> latest;           // what came before it there
};

struct Machine {
  std::mutex mutex;
  std::condition_variable moved;          // an item was done
  Stream legacy;                          // CUDA's default stream
  std::vector<Stream*> streams{&legacy};  // in the order of their making: a seed's order is the same again
  std::set<Event*> events;
  std::set<std::shared_ptr<Capture>> captures;
  std::vector<std::string> complaints;
  long launches = 0;                // of kernels
  cudaError_t fault = cudaSuccess;  // once there is one, every call returns it, as on a GPU
};

// Never destroyed: torch calls in from its own destructors after main.
Machine& machine();

inline Lock hold() { return Lock(machine().mutex); }

// The stream or event behind a handle. One that is not there is a bug that CUDA leaves undefined; here it aborts.
Stream& stream_of(const Lock&, cudaStream_t handle);
Event& event_of(const Lock&, cudaEvent_t handle);

// ---- what is told of wrong use

// On the terminal, if ECHO_RT_VIRTUAL_GPU_TRACE is set.
void trace(const std::string& what);

// A call that CUDA refuses, or whose result it leaves open, is also remembered in words, for tests to look at.
void complain(const Lock&, const std::string& what);
[[noreturn]] void give_up(const std::string& what);

// Notes an error where cudaGetLastError finds it, and returns it.
cudaError_t failed(cudaError_t error);

}  // namespace virtual_gpu
