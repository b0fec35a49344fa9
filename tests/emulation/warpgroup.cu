// A product of one warpgroup, and what can be forgotten about it. See kernels.h.

#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/warpgroup.cuh"
#include "kernels.h"

namespace echo::test {

namespace {

constexpr int kColumns = 96, kDepth = 16, kChunk = 8, kChunks = kDepth / kChunk;

template <class T>
struct Operands {
  T a[kChunks][kWarpgroupRows][kChunk];
  T b[kChunks][kColumns][kChunk];
};

// Chunks of `rows` rows of [rows, depth], each chunk's rows one behind the other.
template <class T>
ECHO_DEVICE void copy(T* target, const T* source, int rows, int depth) {
  for (int item = static_cast<int>(threadIdx.x); item < rows * kChunks; item += kWarpgroupThreads) {
    const int row = item / kChunks, chunk = item % kChunks;
    copy_async_16(target + (chunk * rows + row) * kChunk, source + row * depth + chunk * kChunk);
  }
}

ECHO_DEVICE void store(const float (&sums)[48], float* c) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads, lane = static_cast<int>(threadIdx.x) % kWarpThreads;
#pragma unroll
  for (int i = 0; i < 48; ++i) {
    const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + lane % 4 * 2 + i % 2;
    c[row * kColumns + column] = sums[i];
  }
}

template <class T>
__global__ void __launch_bounds__(kWarpgroupThreads) warpgroup_kernel(ProductParams p) {
  if constexpr (kHasWarpgroupProducts) {
    auto& shared = *dynamic_shared<Operands<T>>();
    float sums[48] = {};
    for (int depth = 0; depth < p.k; depth += kDepth) {
      copy(&shared.a[0][0][0], static_cast<const T*>(p.a) + depth, kWarpgroupRows, p.k);
      copy(&shared.b[0][0][0], static_cast<const T*>(p.b) + depth, kColumns, p.k);
      commit_copies();
      wait_copies<0>();
      if (p.fault != Fault::kNoFence) fence_async_reads();
      if (p.fault != Fault::kNoBarrier) __syncthreads();
      hold(sums);
      if (p.fault != Fault::kNoBegin) begin_products();
      multiply_async<T>(sums, Operand(shared.a, sizeof shared.a[0], kMatrixBytes),
                        Operand(shared.b, sizeof shared.b[0], kMatrixBytes));
      commit_products();
      if (p.fault == Fault::kNoWait) store(sums, p.c);
      if (p.fault == Fault::kForgottenProducts) return;
      wait_products<0>();
      hold(sums);
      if (p.fault != Fault::kNoSecondBarrier) __syncthreads();
    }
    if (p.fault != Fault::kNoWait) store(sums, p.c);
  }
}

}  // namespace

cudaError_t launch_warpgroup_product(const ProductParams& params, cudaStream_t stream) {
  return dispatch_16bit(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(warpgroup_kernel<T>, 1, kWarpgroupThreads, sizeof(Operands<T>), stream, params);
  });
}

}  // namespace echo::test
