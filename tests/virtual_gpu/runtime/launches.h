// Launches of kernels that nvcc compiled.
#pragma once

namespace virtual_gpu {

// For the calling thread: its launches need compute nothing, as it submits what they would compute.
void launches_are_computed_beside(bool so);

}  // namespace virtual_gpu
