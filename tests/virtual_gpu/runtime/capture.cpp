#include "capture.h"

#include <algorithm>

namespace virtual_gpu {
namespace {

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t spoil(const Lock& lock, Capture& capture, cudaError_t error, const std::string& what) {
  capture.invalid = true;
  complain(lock, what);
  return failed(error);
}

// Whether the calling thread may not make unsafe calls beside `capture`.
bool forbids(const Capture& capture) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  bool own = capture.owner == std::this_thread::get_id();
  if (own) return capture.mode != cudaStreamCaptureModeRelaxed;
  return capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
}

// The streams of a capture are free again. The graph goes to the caller, who lets go of it without the lock.
Graph end(const Lock&, Capture& capture) {
  for (Stream* member : capture.members) {
    member->capture = nullptr;
    member->latest.clear();
  }
  capture.members.clear();
  capture.ended = true;
  auto& captures = machine().captures;
  for (auto it = captures.begin(); it != captures.end(); ++it) {
    if (it->get() == &capture) {
      captures.erase(it);
      break;
    }
  }
  return std::move(capture.graph);
}

// Whether work was captured that the origin never waits for: the graph would end before it.
bool unjoined(const Capture& capture) {
  const auto& nodes = capture.graph.nodes;
  std::vector<bool> reached(nodes.size());
  for (size_t index : capture.origin->latest) reached[index] = true;
  for (size_t index = nodes.size(); index-- > 0;) {
    if (!reached[index]) return true;
    for (size_t before : nodes[index].after) reached[before] = true;
  }
  return false;
}

}  // namespace

cudaError_t refuse_if_unsafe(const Lock& lock, const char* call) {
  cudaError_t error = cudaSuccess;
  for (const auto& capture : machine().captures) {
    if (!forbids(*capture)) continue;
    error = spoil(lock, *capture, cudaErrorStreamCaptureUnsupported, std::string(call) + " amid a capture");
  }
  return error;
}

cudaError_t refuse_if_capturing(const Lock& lock, Stream& stream, const char* call) {
  if (stream.capture == nullptr) return cudaSuccess;
  return spoil(lock, *stream.capture, cudaErrorStreamCaptureUnsupported, std::string(call) + " of a capturing stream");
}

cudaError_t refuse_amid_any_capture(const Lock& lock, const char* call) {
  cudaError_t error = cudaSuccess;
  for (const auto& capture : machine().captures) {
    error = spoil(lock, *capture, cudaErrorStreamCaptureUnsupported, std::string(call) + " amid a capture");
  }
  return error;
}

cudaError_t refuse_captured(const Lock& lock, const Event& event, const char* call) {
  if (event.capture == nullptr) return cudaSuccess;
  complain(lock, std::string(call) + " of an event recorded in a capture");
  return failed(cudaErrorCapturedEvent);
}

cudaError_t record_in_capture(const Lock&, Stream& stream, Event& event) {
  if (stream.capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
  event.capture = stream.capture;
  event.latest = stream.latest;
  return cudaSuccess;
}

cudaError_t wait_in_capture(const Lock& lock, Stream& stream, Event& event) {
  if (event.capture == nullptr) {
    // The graph cannot hold work that came before it; nor would a replay wait for it.
    return spoil(lock, *stream.capture, cudaErrorStreamCaptureIsolation, "a capture waits for an event of outside");
  }
  Capture& capture = *event.capture;
  if (capture.ended) {
    complain(lock, "wait for an event of a capture that has ended");
    return failed(cudaErrorStreamCaptureIsolation);
  }
  if (stream.capture != nullptr && stream.capture != event.capture) {
    spoil(lock, *stream.capture, cudaErrorStreamCaptureMerge, "a capture waits for an event of another");
    return spoil(lock, capture, cudaErrorStreamCaptureMerge, "an event of a capture is waited for in another");
  }
  if (capture.invalid) return failed(cudaErrorStreamCaptureInvalidated);
  if (stream.capture == nullptr) {
    stream.capture = event.capture;
    stream.latest.clear();
    capture.members.insert(&stream);
  }
  stream.latest.insert(event.latest.begin(), event.latest.end());
  return cudaSuccess;
}

}  // namespace virtual_gpu

using namespace virtual_gpu;

VIRTUAL_GPU_API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  static uint64_t captures = 0;
  Lock lock = hold();
  Stream& stream = stream_of(lock, handle);
  if (&stream == &machine().legacy) {
    complain(lock, "capture of the default stream, which all others wait for");
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  if (stream.capture != nullptr) {
    complain(lock, "capture begun on a stream that is being captured");
    return failed(cudaErrorIllegalState);
  }
  auto capture = std::make_shared<Capture>();
  capture->id = ++captures;
  capture->origin = &stream;
  capture->mode = mode;
  capture->owner = std::this_thread::get_id();
  capture->members.insert(&stream);
  stream.capture = capture;
  machine().captures.insert(capture);
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* result) {
  Graph graph;  // outlives the lock: see Lock
  Lock lock = hold();
  Stream& stream = stream_of(lock, handle);
  *result = nullptr;
  std::shared_ptr<Capture> capture = stream.capture;
  if (capture == nullptr) {
    complain(lock, "end of a capture that was not begun");
    return failed(cudaErrorIllegalState);
  }
  if (capture->origin != &stream) {
    return spoil(lock, *capture, cudaErrorStreamCaptureUnmatched,
                 "capture ended on another stream than it was begun on");
  }
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->owner != std::this_thread::get_id()) {
    return spoil(lock, *capture, cudaErrorStreamCaptureWrongThread, "capture ended by another thread than began it");
  }
  bool incomplete = !capture->invalid && unjoined(*capture);
  graph = end(lock, *capture);
  if (capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
  if (incomplete) {
    complain(lock, "capture ended before the origin waited for all that was captured");
    return failed(cudaErrorStreamCaptureUnjoined);
  }
  *result = reinterpret_cast<cudaGraph_t>(new Graph(std::move(graph)));
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock = hold();
  const auto& capture = stream_of(lock, handle).capture;
  *status = capture == nullptr ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                                     unsigned long long* id, cudaGraph_t* graph,
                                                     const cudaGraphNode_t** dependencies,
                                                     const cudaGraphEdgeData** edges, size_t* count) {
  // torch asks for status and id alone. Who asks for the graph gets none, as there is no editing of it here.
  if (graph != nullptr) *graph = nullptr;
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  cudaStreamIsCapturing(handle, status);
  Lock lock = hold();
  const auto& capture = stream_of(lock, handle).capture;
  if (id != nullptr) *id = capture == nullptr ? 0 : capture->id;
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
