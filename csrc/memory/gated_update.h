#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo {

// c = RMSNorm(candidate) * norm, g = sigmoid([old ; c] gate_weight^T + gate_bias), out = g * old + (1 - g) * c.
// Strides are in elements, and every row starts on 16 bytes.
struct GatedUpdateParams {
  const void* old;          // [rows, dim], rows old_row_stride apart
  const void* candidate;    // [rows, dim], rows candidate_row_stride apart
  const float* norm;        // [dim]
  const void* gate_weight;  // [dim, 2 * dim], rows weight_row_stride apart; columns below dim belong to old
  const void* gate_bias;    // [dim]
  void* out;                // [rows, dim] (written), rows out_row_stride apart; aliases nothing: old is read all along
  ScalarType dtype;         // of everything but norm: kBFloat16 or kFloat16
  int64_t rows;             // >= 0
  int64_t dim;              // a multiple of 16
  int64_t old_row_stride;
  int64_t candidate_row_stride;
  int64_t weight_row_stride;
  int64_t out_row_stride;
  float eps;
};

// cudaErrorInvalidValue for a dtype, size or stride that is none of the above, or anything that must start on 16 bytes
// and does not. Nothing is launched then, nor for zero rows (cudaSuccess).
cudaError_t launch_gated_update(const GatedUpdateParams& params, cudaStream_t stream);

}  // namespace echo
