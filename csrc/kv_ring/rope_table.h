// Rotary angles of absolute frames (or rows, or columns): out[f, c] = (cos, sin)(frames[f] · inverse_frequencies[c]).

#pragma once

#include <cstdint>

#include "common/device.h"

namespace echo {

struct RopeTableParams {
  const int64_t* frames;              // [frame_count]
  const double* inverse_frequencies;  // [pairs]
  float* out;                         // [frame_count, pairs, 2]: cosine, sine
  int64_t frame_count;
  int64_t pairs;
};

cudaError_t launch_rope_table(const RopeTableParams& params, cudaStream_t stream);

}  // namespace echo
