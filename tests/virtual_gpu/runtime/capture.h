// The rules of stream capture, for all calls that must keep them.
#pragma once

#include "machine.h"

namespace virtual_gpu {

// For calls that might wait for the device, or change what a capture takes for granted. CUDA refuses them while a
// capture is under way that the thread's mode does not allow them beside, and that capture is lost.
cudaError_t refuse_if_unsafe(const Lock&, const char* call);

// For calls on the very stream that is being captured, which no mode allows: its work is not running, so there is
// nothing to wait for or to ask.
cudaError_t refuse_if_capturing(const Lock&, Stream& stream, const char* call);

// For what waits for the whole device: some of its streams are not running.
cudaError_t refuse_amid_any_capture(const Lock&, const char* call);

// An event recorded in a capture marks a place in the graph, and only streams of that capture can wait there.
cudaError_t record_in_capture(const Lock&, Stream& stream, Event& event);
cudaError_t wait_in_capture(const Lock&, Stream& stream, Event& event);

// The event was last recorded in a capture: the host has nothing to wait for.
cudaError_t refuse_captured(const Lock&, const Event& event, const char* call);

}  // namespace virtual_gpu
