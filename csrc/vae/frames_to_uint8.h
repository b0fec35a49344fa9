// The decoder's video in [-1, 1] to bytes that a player shows.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

struct FramesToUint8Params {
  const void* video;  // [count]: frames · height · width · 3, clamped to [-1, 1]
  uint8_t* out;       // [count], written
  ScalarType dtype;   // of video
  int64_t count;
};

// video and out start on 16 bytes.
cudaError_t launch_frames_to_uint8(const FramesToUint8Params& params, cudaStream_t stream);

}  // namespace echo
