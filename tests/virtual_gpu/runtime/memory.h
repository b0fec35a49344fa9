// Device memory and pinned memory, both of the host.
#pragma once

#include "machine.h"

namespace virtual_gpu {

// What a device has unless ECHO_RT_VIRTUAL_GPU_BYTES says otherwise.
size_t capacity(const Lock&);

// cudaMemoryTypeDevice, Host (pinned) or Unregistered (pageable).
cudaMemoryType type_of(const Lock&, const void* address);

// Whether each range lies in one allocation that is still there, or in memory that the device knows nothing of.
bool all_allocated(const Lock&, const std::vector<Range>& ranges);

}  // namespace virtual_gpu
