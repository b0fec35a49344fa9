// Streams, and functions of the host in their queues.

#include <algorithm>

#include "capture.h"
#include "engine.h"

using namespace virtual_gpu;

VIRTUAL_GPU_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
  Lock lock = hold();
  if (flags != cudaStreamNonBlocking) {
    // A blocking stream and the default one wait for each other at every call. torch makes none.
    complain(lock, "a blocking stream is made");
    return failed(cudaErrorNotSupported);
  }
  auto* stream = new Stream;
  stream->priority = priority;
  machine().streams.push_back(stream);
  *handle = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Lock lock = hold();
  Stream& stream = stream_of(lock, handle);
  cudaError_t error = wait_for(std::move(lock), stream);
  lock = hold();
  auto& streams = machine().streams;
  streams.erase(std::find(streams.begin(), streams.end(), &stream));
  delete &stream;
  return error;
}

VIRTUAL_GPU_API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  Lock lock = hold();
  *priority = stream_of(lock, handle).priority;
  return cudaSuccess;
}

VIRTUAL_GPU_API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Lock lock = hold();
  Stream& stream = stream_of(lock, handle);
  if (cudaError_t error = refuse_if_capturing(lock, stream, "cudaStreamQuery")) return error;
  if (cudaError_t error = refuse_if_unsafe(lock, "cudaStreamQuery")) return error;
  if (machine().fault != cudaSuccess) return failed(machine().fault);
  if (idle(stream)) return cudaSuccess;
  go_on_beside(lock);
  return cudaErrorNotReady;
}

VIRTUAL_GPU_API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock = hold();
  Stream& stream = stream_of(lock, handle);
  if (cudaError_t error = refuse_if_capturing(lock, stream, "cudaStreamSynchronize")) return error;
  if (cudaError_t error = refuse_if_unsafe(lock, "cudaStreamSynchronize")) return error;
  return wait_for(std::move(lock), stream);
}

VIRTUAL_GPU_API cudaError_t cudaDeviceSynchronize() {
  Lock lock = hold();
  if (cudaError_t error = refuse_amid_any_capture(lock, "cudaDeviceSynchronize")) return error;
  return wait_for_all(std::move(lock));
}

VIRTUAL_GPU_API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  Item item;
  item.name = "a function of the host";
  item.work = [=] {
    function(data);
    return true;
  };
  return submit(handle, std::move(item));
}
