// Events: places in the queues, that streams and the host wait for.

#include "capture.h"
#include "engine.h"

using namespace virtual_gpu;

VIRTUAL_GPU_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  Lock lock = hold();
  auto* event = new Event;
  event->flags = flags;
  machine().events.insert(event);
  *handle = reinterpret_cast<cudaEvent_t>(event);
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }

// What waits for it goes on waiting: it keeps the record.
VIRTUAL_GPU_API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  Lock lock = hold();
  Event& event = event_of(lock, handle);
  machine().events.erase(&event);
  delete &event;
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned flags) {
  Lock lock = hold();
  if (machine().fault != cudaSuccess) return failed(machine().fault);
  Stream& stream = stream_of(lock, stream_handle);
  Event& event = event_of(lock, handle);
  if (stream.capture != nullptr) {
    if (flags == cudaEventRecordDefault) return record_in_capture(lock, stream, event);
    complain(lock, "an external event is recorded in a capture");
    return failed(cudaErrorNotSupported);
  }
  event.capture = nullptr;
  Item item;
  item.kind = Item::Kind::kRecord;
  item.name = "record";
  item.record = event.record = std::make_shared<Record>();
  enqueue_mark(lock, stream, std::move(item));
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}

VIRTUAL_GPU_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned flags) {
  Lock lock = hold();
  Stream& stream = stream_of(lock, stream_handle);
  Event& event = event_of(lock, handle);
  // An event that was never recorded has nothing before it.
  if (event.capture == nullptr && event.record == nullptr) return cudaSuccess;
  if (stream.capture != nullptr && flags != cudaEventWaitDefault) {
    complain(lock, "a capture waits for an external event");
    return failed(cudaErrorNotSupported);
  }
  if (event.capture != nullptr || stream.capture != nullptr) return wait_in_capture(lock, stream, event);
  Item item;
  item.kind = Item::Kind::kWait;
  item.name = "wait";
  item.record = event.record;
  enqueue_mark(lock, stream, std::move(item));
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock = hold();
  Event& event = event_of(lock, handle);
  if (cudaError_t error = refuse_captured(lock, event, "cudaEventQuery")) return error;
  if (cudaError_t error = refuse_if_unsafe(lock, "cudaEventQuery")) return error;
  if (machine().fault != cudaSuccess) return failed(machine().fault);
  if (event.record == nullptr || event.record->passed) return cudaSuccess;
  go_on_beside(lock);
  return cudaErrorNotReady;
}

VIRTUAL_GPU_API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock = hold();
  Event& event = event_of(lock, handle);
  if (cudaError_t error = refuse_captured(lock, event, "cudaEventSynchronize")) return error;
  if (cudaError_t error = refuse_if_unsafe(lock, "cudaEventSynchronize")) return error;
  if (event.record == nullptr) return cudaSuccess;
  return wait_for(std::move(lock), event.record);
}

VIRTUAL_GPU_API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t first, cudaEvent_t second) {
  Lock lock = hold();
  for (cudaEvent_t handle : {first, second}) {
    const Event& event = event_of(lock, handle);
    if (event.record != nullptr && event.capture == nullptr && !(event.flags & cudaEventDisableTiming)) continue;
    complain(lock, "the time is asked of an event that has none");
    return failed(cudaErrorInvalidResourceHandle);
  }
  const Record& before = *event_of(lock, first).record;
  const Record& after = *event_of(lock, second).record;
  if (!before.passed || !after.passed) return failed(cudaErrorNotReady);
  *milliseconds = static_cast<float>(after.milliseconds - before.milliseconds);
  return cudaSuccess;
}
