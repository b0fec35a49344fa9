// x += gate · y, in place, then out = LayerNorm(x) · scale + shift.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

struct GatedResidualNormParams {
  void* x;                     // [tokens, dim], read and written
  const void* y;               // [tokens, dim]
  const float* gate;           // [dim], or null: 1
  const float* shift;          // [dim]
  const float* scale;          // [dim], the 1 + included
  void* out;                   // [tokens, dim], contiguous, written
  float* out_scale = nullptr;  // [tokens], written: out is float8 with these scales; or null: out is of dtype
  ScalarType dtype;            // of x, y
  int64_t tokens;
  int64_t dim;
  int64_t x_stride;  // elements from token to token
  int64_t y_stride;
  float eps;
};

// cudaErrorInvalidValue for dim > 8192 (4096 where a row or a vector is not made of aligned 16-byte pieces).
cudaError_t launch_gated_residual_norm(const GatedResidualNormParams& params, cudaStream_t stream);

}  // namespace echo
