// out, out_scale = float8 of GELU(x), one scale for each token.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

struct GeluQuantizeParams {
  const void* x;     // [tokens, dim]
  void* out;         // float8 [tokens, dim], contiguous, written
  float* out_scale;  // [tokens], written
  ScalarType dtype;  // of x
  int64_t tokens;
  int64_t dim;
  int64_t x_stride;  // elements from token to token
};

// cudaErrorInvalidValue for dim > 12288 (4096 where a row is not made of aligned 16-byte pieces).
cudaError_t launch_gelu_quantize(const GeluQuantizeParams& params, cudaStream_t stream);

}  // namespace echo
