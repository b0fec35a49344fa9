// out[f, c] = (cos, sin)(frames[f] · inverse_frequencies[c]), frames [F], inverse_frequencies [C], out [F, C, 2].
//
// Runs when a state is made and when a prompt switches: tens of thousands of angles at the most, so one thread an
// angle and nothing cleverer.

#include "common/launch.h"
#include "kv_ring/rope_table.h"
#include "kv_ring/rotation.cuh"

namespace echo {
namespace {

// A float64 sine needs some sixty registers: four blocks of 256 threads still fit a multiprocessor.
constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) rope_table_kernel(RopeTableParams p) {
  const int64_t angle = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (angle >= p.frame_count * p.pairs) return;
  const Turn turn = turn_of(p.frames[angle / p.pairs], p.inverse_frequencies[angle % p.pairs]);
  p.out[2 * angle] = turn.cos;
  p.out[2 * angle + 1] = turn.sin;
}

}  // namespace

cudaError_t launch_rope_table(const RopeTableParams& params, cudaStream_t stream) {
  const int64_t angles = params.frame_count * params.pairs;
  if (angles == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((angles + kThreads - 1) / kThreads));
  return launch(rope_table_kernel, grid, dim3(kThreads), 0, stream, params);
}

}  // namespace echo
