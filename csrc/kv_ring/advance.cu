// Steps positions to the next block and derives from it what the block's kernels read:
//
//     temporal_block  [frames_per_block, pairs, 2]             turns of the block's own absolute frames
//     temporal_anchor [memory_frames + sink_frames, pairs, 2]  turns of the memory and the sink where the shift puts
//     them write_index     [tokens]                                 KV rows that the block occupies
//
// One block of threads does it all: it runs once in a quarter of a second, and a second block could see positions
// that the first has already stepped.

#include "common/launch.h"
#include "kv_ring/advance.h"
#include "kv_ring/rotation.cuh"

namespace echo {
namespace {

// About as many as there are angles at the released sizes (9 frames of 22 pairs); write_index takes a few rounds.
constexpr int kThreads = 256;

__device__ void write_turns(int64_t first_frame, int64_t frames, const AdvanceParams& p, float* table) {
  for (int64_t i = threadIdx.x; i < frames * p.pairs; i += kThreads) {
    const Turn turn = turn_of(first_frame + i / p.pairs, p.inverse_frequencies[i % p.pairs]);
    table[2 * i] = turn.cos;
    table[2 * i + 1] = turn.sin;
  }
}

__global__ void __launch_bounds__(kThreads) advance_kernel(AdvanceParams p) {
  const int64_t block = p.positions[0] + 1;
  const int64_t first = p.layout.first_frame(block);
  const int64_t shift = p.layout.shift(block);
  const int64_t memory_frame = p.layout.memory_frame(block);
  const int64_t slot = p.layout.slot(first);

  __syncthreads();  // every thread has the old block number before one thread replaces it
  if (threadIdx.x == 0) {
    p.positions[0] = block;
    p.positions[1] = first;
    p.positions[2] = shift;
    p.positions[3] = memory_frame;
    p.positions[4] = slot;
  }

  write_turns(first, p.layout.frames_per_block, p, p.temporal_block);
  write_turns(memory_frame, p.layout.memory_frames, p, p.temporal_anchor);
  write_turns(shift, p.layout.sink_frames, p, p.temporal_anchor + 2 * p.layout.memory_frames * p.pairs);

  const int64_t first_row = slot * (p.tokens / p.layout.frames_per_block);
  for (int64_t i = threadIdx.x; i < p.tokens; i += kThreads) p.write_index[i] = first_row + i;
}

}  // namespace

cudaError_t launch_advance(const AdvanceParams& params, cudaStream_t stream) {
  return launch(advance_kernel, dim3(1), dim3(kThreads), 0, stream, params);
}

}  // namespace echo
