// Standard normal noise as a function of seed, block, step and element.

#pragma once

#include <cstdint>

#include "common/device.h"

namespace echo {

struct CounterNoiseParams {
  float* out;            // [count], written
  const int64_t* block;  // [1]: the block's number in the position record
  const int64_t* seed;   // [2]: its low and its high 32 bits
  uint32_t step;         // the denoising step
  int64_t count;
};

// out starts on 16 bytes.
cudaError_t launch_counter_noise(const CounterNoiseParams& params, cudaStream_t stream);

}  // namespace echo
