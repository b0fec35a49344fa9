// The one virtual GPU of the process, and what is told of its wrong use.

#include "machine.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace virtual_gpu {
namespace {

thread_local cudaError_t last_error = cudaSuccess;

}  // namespace

Machine& machine() {
  static auto* one = new Machine;
  return *one;
}

Stream& stream_of(const Lock&, cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return machine().legacy;
  auto* stream = reinterpret_cast<Stream*>(handle);
  const auto& streams = machine().streams;
  if (std::find(streams.begin(), streams.end(), stream) == streams.end()) {
    give_up("a stream that is not there, or a stream per thread, was used");
  }
  return *stream;
}

Event& event_of(const Lock&, cudaEvent_t handle) {
  auto* event = reinterpret_cast<Event*>(handle);
  if (machine().events.count(event) == 0) give_up("an event that is not there was used");
  return *event;
}

void trace(const std::string& what) {
  static const bool wanted = std::getenv("ECHO_RT_VIRTUAL_GPU_TRACE") != nullptr;
  if (wanted) std::fprintf(stderr, "virtual GPU: %s\n", what.c_str());
}

void complain(const Lock&, const std::string& what) {
  machine().complaints.push_back(what);
  trace(what);
}

void give_up(const std::string& what) {
  std::fprintf(stderr, "virtual GPU: %s\n", what.c_str());
  std::abort();
}

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace virtual_gpu

VIRTUAL_GPU_API cudaError_t cudaGetLastError() {
  cudaError_t error = virtual_gpu::last_error;
  virtual_gpu::last_error = cudaSuccess;
  return error;
}

VIRTUAL_GPU_API cudaError_t cudaPeekAtLastError() { return virtual_gpu::last_error; }
