// From the model's flow to the clean latents, and back into noise for the next denoising step.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

struct FlowStepParams {
  float* x;              // [count], read and written
  const void* flow;      // [count]
  const double* sigmas;  // [2]: of this step and of the next
  const float* noise;    // [count], or null: x becomes the clean latents
  ScalarType dtype;      // of flow
  int64_t count;
};

// x, flow and noise start on 16 bytes.
cudaError_t launch_flow_step(const FlowStepParams& params, cudaStream_t stream);

}  // namespace echo
