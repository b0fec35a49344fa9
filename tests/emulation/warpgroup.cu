// A product of one warpgroup, with and without a warp that copies for it, and what can be forgotten. See kernels.h.

#include "common/barrier.cuh"
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

// Chunks of `rows` rows of [rows, depth], each chunk's rows one behind the other; by thread `thread` of `threads`.
template <class T>
ECHO_DEVICE void copy(T* target, const T* source, int rows, int depth, int thread, int threads) {
  for (int item = thread; item < rows * kChunks; item += threads) {
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
      const int thread = static_cast<int>(threadIdx.x);
      copy(&shared.a[0][0][0], static_cast<const T*>(p.a) + depth, kWarpgroupRows, p.k, thread, kWarpgroupThreads);
      copy(&shared.b[0][0][0], static_cast<const T*>(p.b) + depth, kColumns, p.k, thread, kWarpgroupThreads);
      commit_copies();
      wait_copies<0>();
      if (p.fault != Fault::kNoFence || thread != 5) fence_async();
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

constexpr int kStages = 2;

template <class T>
struct Pipeline {
  alignas(128) Operands<T> stages[kStages];
  Barrier full[kStages], empty[kStages];
};

template <class T>
ECHO_DEVICE void copy_slabs(const ProductParams& p, Pipeline<T>& shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  Turn<kStages> turn;
  for (int slab = 0; slab < p.k / kDepth; ++slab, turn.advance()) {
    Operands<T>& stage = shared.stages[turn.stage];
    Barrier& full = shared.full[turn.stage];
    shared.empty[turn.stage].wait(turn.parity ^ 1);
    if (lane == 0) {
      full.arrive_expecting(p.fault == Fault::kNoExpect ? 0 : sizeof stage.b);
      copy_bulk(stage.b, static_cast<const T*>(p.b) + slab * kColumns * kDepth,
                p.fault == Fault::kShortBulkCopy ? 8 : sizeof stage.b, full);
      if (p.fault == Fault::kTwoArrivals) full.arrive();
    }
    copy(&stage.a[0][0][0], static_cast<const T*>(p.a) + slab * kDepth, kWarpgroupRows, p.k, lane, kWarpThreads);
    commit_copies();
    wait_copies<0>();
    if (p.fault != Fault::kNoFence) fence_async();
    if (lane != 1 || p.fault != Fault::kNoArrival) full.arrive();
  }
}

template <class T>
ECHO_DEVICE void multiply_slabs(const ProductParams& p, Pipeline<T>& shared) {
  float sums[48] = {};
  Turn<kStages> turn;
  for (int slab = 0; slab < p.k / kDepth - (p.fault == Fault::kForgottenCopies); ++slab, turn.advance()) {
    const Operands<T>& stage = shared.stages[turn.stage];
    shared.full[turn.stage].wait(turn.parity ^ (p.fault == Fault::kWrongParity));
    hold(sums);
    begin_products();
    multiply_async<T>(sums, Operand(stage.a, sizeof stage.a[0], kMatrixBytes),
                      Operand(stage.b, sizeof stage.b[0], kMatrixBytes));
    commit_products();
    if (p.fault == Fault::kEarlyRelease) shared.empty[turn.stage].arrive();
    wait_products<0>();
    hold(sums);
    if (p.fault != Fault::kEarlyRelease && p.fault != Fault::kNoRelease) shared.empty[turn.stage].arrive();
  }
  store(sums, p.c);
}

template <class T>
__global__ void __launch_bounds__(kWarpgroupThreads + kWarpThreads) pipeline_kernel(ProductParams p) {
  if constexpr (kHasWarpgroupProducts) {
    auto& shared = *dynamic_shared<Pipeline<T>>();
    if (threadIdx.x == 0) {
      for (auto& full : shared.full) full.init(kWarpThreads + 1);
      for (auto& empty : shared.empty) empty.init(kWarpgroupThreads);
      if (p.fault != Fault::kNoFenceOfBarriers) fence_async();
    }
    if (p.fault != Fault::kNoBarrier) __syncthreads();
    if (threadIdx.x < kWarpgroupThreads) {
      multiply_slabs(p, shared);
    } else {
      copy_slabs(p, shared);
    }
  }
}

}  // namespace

cudaError_t launch_pipelined_product(const ProductParams& params, cudaStream_t stream) {
  return dispatch_16bit(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(pipeline_kernel<T>, 1, kWarpgroupThreads + kWarpThreads, sizeof(Pipeline<T>), stream, params);
  });
}

cudaError_t launch_warpgroup_product(const ProductParams& params, cudaStream_t stream) {
  return dispatch_16bit(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(warpgroup_kernel<T>, 1, kWarpgroupThreads, sizeof(Operands<T>), stream, params);
  });
}

}  // namespace echo::test
