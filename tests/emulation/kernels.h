// Kernels that exercise the emulation, right ones and such with a planted mistake. Implemented in kernels.cu and
// warpgroup.cu, which are device sources like any other: nvcc compiles them too.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/scalar.h"

namespace echo::test {

enum class Fault {
  kNone,
  kNoWait,           // of an asynchronous copy, or product
  kNoBarrier,        // between writing and reading shared memory
  kNoSecondBarrier,  // between reading shared memory and writing it again
  kNoSyncWarp,
  kUnwritten,  // one element of shared memory
  kBehindStatic,
  kBeforeStatic,
  kBehindDynamic,
  kDivergentBarrier,  // some threads return before it
  kTwoBarriers,       // one in each arm of an if
  kMissingLane,       // in a shuffle
  kTwoShuffles,       // one in each arm of an if
  kMixedBarriers,     // one warp in __syncwarp of all lanes, half of it elsewhere
  kForgottenCopies,
  kForgottenProducts,
  kNoFence,            // between copies, or those of one thread, and a warpgroup's products
  kNoBegin,            // of such products
  kNoFenceOfBarriers,  // between their initialization and bulk copies that end at them
  kNoExpect,           // of the bytes of a bulk copy
  kWrongParity,
  kNoArrival,  // of one lane that copies
  kTwoArrivals,
  kNoRelease,      // of a stage that was read
  kEarlyRelease,   // before the products that read it have ended
  kShortBulkCopy,  // of 8 bytes
  kMisaligned,
  kDynamicTooLarge,  // more asked than launched with
  kStaticTooLarge,
};

// C [m, n] = A [m, k] · B [k, n], row-major, all sizes multiples of 8. Faults: kNoWait, kNoBarrier, kNoSecondBarrier.
struct ProductParams {
  const void* a;
  const void* b;
  float* c;
  int m, n, k;
  ScalarType dtype;
  Fault fault = Fault::kNone;
};
cudaError_t launch_product(const ProductParams& params, cudaStream_t stream);

// C [64, 96] = A [64, k] · B [96, k]^T by one warpgroup, k a multiple of 16. Faults: kNoWait, kNoBarrier,
// kNoSecondBarrier, kForgottenProducts, kNoFence, kNoBegin.
cudaError_t launch_warpgroup_product(const ProductParams& params, cudaStream_t stream);

// The same by a pipeline: a warp copies, A by copy_async_16 and B in bulk, to two stages from which a warpgroup
// multiplies. b as [k / 16, 2, 96, 8]. Faults: kNoBarrier (behind the initialization), kNoFence, kForgottenCopies and
// those from kNoFenceOfBarriers to kShortBulkCopy.
cudaError_t launch_pipelined_product(const ProductParams& params, cudaStream_t stream);

// Turns each row of [blocks, 128] around, `rounds` times, through shared memory.
cudaError_t launch_reverse(float* rows, int blocks, int rounds, Fault fault, cudaStream_t stream);

// out[i] = in[i ^ 1] through shared memory, one warp.
cudaError_t launch_swap_neighbours(const float* in, float* out, Fault fault, cudaStream_t stream);

// For each of `rows` rows of `size` values: sum by block_sum, maximum by warp_max of the sums; total by atomicAdd.
cudaError_t launch_sums(const float* in, float* sums, float* largest, float* total, int rows, int size,
                        cudaStream_t stream);

// One row of 32 for each shuffle or vote of the lane numbers; out [7, 32].
cudaError_t launch_collectives(int* out, cudaStream_t stream);

// The registers of every lane after ldmatrix of [32, 8] values 0, 1, 2 ...; out [2 (transposed), 32 lanes, 4
// registers].
cudaError_t launch_fragments(uint32_t* out, cudaStream_t stream);

// One block of `threads` threads that makes the mistake.
cudaError_t launch_mistake(float* out, int threads, int dynamic_bytes, Fault fault, cudaStream_t stream);

// `rounds` block barriers of `threads` threads; the same of shuffles.
cudaError_t launch_barriers(int threads, int rounds, cudaStream_t stream);
cudaError_t launch_shuffles(float* out, int threads, int rounds, cudaStream_t stream);

}  // namespace echo::test
