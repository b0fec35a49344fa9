// See kernels.h.

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "kernels.h"

namespace echo::test {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarpThreads;

// ---- product

constexpr int kTileM = 64, kTileN = 64, kTileK = 16, kPad = 8;

template <class T>
struct ProductShared {
  T a[2][kTileM][kTileK + kPad];
  T b[2][kTileK][kTileN + kPad];
};

template <class T>
__device__ void start_tile(ProductShared<T>& shared, const ProductParams& p, int row0, int column0, int step) {
  constexpr int kSize = Vec<T>::kSize;
  const T *a = static_cast<const T*>(p.a), *b = static_cast<const T*>(p.b);
  const int buffer = step % 2, k0 = step * kTileK;
  for (int i = static_cast<int>(threadIdx.x); i < kTileM * kTileK / kSize; i += kThreads) {
    const int row = i / (kTileK / kSize), column = i % (kTileK / kSize) * kSize;
    const bool valid = row0 + row < p.m && k0 + column < p.k;
    copy_async_16(&shared.a[buffer][row][column], valid ? a + (row0 + row) * p.k + k0 + column : a, valid);
  }
  for (int i = static_cast<int>(threadIdx.x); i < kTileK * kTileN / kSize; i += kThreads) {
    const int row = i / (kTileN / kSize), column = i % (kTileN / kSize) * kSize;
    const bool valid = k0 + row < p.k && column0 + column < p.n;
    copy_async_16(&shared.b[buffer][row][column], valid ? b + (k0 + row) * p.n + column0 + column : b, valid);
  }
}

// Each warp makes 16 rows of a tile of 64 x 64; two buffers, one filled while the other is multiplied.
template <class T>
__global__ void __launch_bounds__(kThreads) product_kernel(const ProductParams p) {
  ProductShared<T>& shared = *dynamic_shared<ProductShared<T>>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads, warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const int row0 = static_cast<int>(blockIdx.y) * kTileM, column0 = static_cast<int>(blockIdx.x) * kTileN;
  const int steps = (p.k + kTileK - 1) / kTileK;
  float c[kTileN / 8][4] = {};

  start_tile(shared, p, row0, column0, 0);
  commit_copies();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) start_tile(shared, p, row0, column0, step + 1);
    commit_copies();
    if (p.fault != Fault::kNoWait) wait_copies<1>();
    if (p.fault != Fault::kNoBarrier) __syncthreads();
    uint32_t a[4];
    load_matrix_x4(a, &shared.a[step % 2][warp * 16 + lane % 16][lane / 16 * 8]);
#pragma unroll
    for (int column = 0; column < kTileN; column += 16) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, &shared.b[step % 2][lane % 16][column + lane / 16 * 8]);
      multiply_accumulate<T>(c[column / 8], a, {b[0], b[1]});
      multiply_accumulate<T>(c[column / 8 + 1], a, {b[2], b[3]});
    }
    if (p.fault != Fault::kNoSecondBarrier) __syncthreads();
  }
  wait_copies<0>();

#pragma unroll
  for (int i = 0; i < kTileN / 8 * 4; ++i) {
    const int row = row0 + warp * 16 + lane / 4 + 8 * (i % 4 / 2), column = column0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < p.m && column < p.n) p.c[row * p.n + column] = c[i / 4][i % 4];
  }
}

// ---- shared memory and barriers

__global__ void __launch_bounds__(kThreads) reverse_kernel(float* rows, int rounds, Fault fault) {
  ECHO_SHARED(float[kThreads], row);
  const unsigned i = threadIdx.x;
  float* mine = rows + blockIdx.x * kThreads;
  for (int round = 0; round < rounds; ++round) {
    if (fault != Fault::kUnwritten || i != 5) row[i] = mine[i] + static_cast<float>(round);
    if (fault != Fault::kNoBarrier) __syncthreads();
    mine[i] = row[kThreads - 1 - i];
    if (fault != Fault::kNoSecondBarrier) __syncthreads();
  }
}

__global__ void swap_neighbours_kernel(const float* in, float* out, Fault fault) {
  ECHO_SHARED(float[kWarpThreads], values);
  const unsigned lane = threadIdx.x;
  values[lane] = in[lane];
  if (fault != Fault::kNoSyncWarp) __syncwarp();
  out[lane] = values[lane ^ 1];
}

__global__ void mistake_kernel(float* out, int threads, Fault fault) {
  ECHO_SHARED(float[32], fixed);
  const int i = static_cast<int>(threadIdx.x);
  const bool first_half = i < threads / 2;
  float result = 0.0f;
  switch (fault) {
    case Fault::kBehindStatic:
      fixed[i + 1] = 1.0f;
      break;
    case Fault::kBeforeStatic:
      fixed[i - 1] = 1.0f;
      break;
    case Fault::kBehindDynamic:
      dynamic_shared<float>()[i + 1] = 1.0f;
      break;
    case Fault::kDivergentBarrier:
      if (first_half) __syncthreads();
      break;
    case Fault::kTwoBarriers:
      if (first_half) {
        __syncthreads();
        result = 1.0f;
      } else {
        __syncthreads();
        result = 2.0f;
      }
      break;
    case Fault::kMissingLane:
      if (i != 3) result = __shfl_xor_sync(kAllLanes, 1.0f, 1);
      break;
    case Fault::kTwoShuffles:
      if (first_half) {
        result = __shfl_xor_sync(kAllLanes, 1.0f, 1);
      } else {
        result = __shfl_xor_sync(kAllLanes, 2.0f, 2);
      }
      break;
    case Fault::kMixedBarriers:
      if (first_half) {
        __syncwarp();
      } else {
        __syncthreads();
      }
      break;
    case Fault::kForgottenCopies:
      copy_async_16(&fixed[i % 8 * 4], out);
      commit_copies();
      break;
    case Fault::kMisaligned:
      result = Vec<float>::load(out + 1)[0];
      break;
    case Fault::kDynamicTooLarge:
      result = static_cast<float>(i) + *dynamic_shared<float>(1000);
      break;
    case Fault::kStaticTooLarge: {
#if defined(ECHO_RT_EMULATED)
      ECHO_SHARED(float[12289], too_many);  // nvcc refuses this by itself
      result = too_many[i];
#endif
      break;
    }
    default:
      break;
  }
  out[i] = result;
}

// ---- collectives

__global__ void __launch_bounds__(kThreads)
    sums_kernel(const float* in, float* sums, float* largest, float* total, int size) {
  ECHO_SHARED(float[kWarps], one);
  ECHO_SHARED(float[2 * kWarps], two);
  const float* row = in + static_cast<size_t>(blockIdx.x) * size;
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) sum += row[i];
  const float result = block_sum<kWarps>(sum, one);
  float halves[2] = {0.5f * sum, -sum};
  block_sum<kWarps>(halves, two);
  // Every thread has the sums: lane 0 alone would not show it.
  const float most = warp_max(threadIdx.x % 32 == 31 ? result : halves[1]);
  if (threadIdx.x == kThreads - 1) {
    sums[blockIdx.x] = 2.0f * halves[0];
    largest[blockIdx.x] = most;
    atomicAdd(total, result);
  }
}

__global__ void collectives_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int row = 0;
  const auto put = [&](int value) { out[row++ * 32 + lane] = value; };
  put(__shfl_sync(kAllLanes, lane, 5));
  put(__shfl_sync(kAllLanes, lane, 1, 8));
  put(__shfl_xor_sync(kAllLanes, lane, 3));
  put(__shfl_down_sync(kAllLanes, lane, 2, 16));
  put(__shfl_up_sync(kAllLanes, lane, 4));
  put(static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0)));
  // The two halves of the warp meet apart from each other.
  const unsigned half = lane < 16 ? 0x0000FFFF : 0xFFFF0000;
  put(2 * __any_sync(half, lane == 20) + __all_sync(half, lane >= 16));
}

__global__ void fragments_kernel(uint32_t* out) {
  ECHO_SHARED(Vec<__half>[32], rows);
  const int lane = static_cast<int>(threadIdx.x);
  uint16_t* row = reinterpret_cast<uint16_t*>(&rows[lane]);
  for (int i = 0; i < 8; ++i) row[i] = static_cast<uint16_t>(lane * 8 + i);
  __syncwarp();
  uint32_t fragment[4], transposed[4], pair[2];
  load_matrix_x4(fragment, &rows[lane]);
  load_matrix_x4_transposed(transposed, &rows[lane]);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = fragment[i], out[128 + lane * 4 + i] = transposed[i];
  // Two matrices: the second of them, as register 1, must be what four gave.
  load_matrix_x2(pair, &rows[lane % 16]);
  if (pair[0] != fragment[0] || pair[1] != fragment[1]) out[lane * 4] = ~0u;
  load_matrix_x2_transposed(pair, &rows[lane % 16]);
  if (pair[0] != transposed[0] || pair[1] != transposed[1]) out[128 + lane * 4] = ~0u;
}

__global__ void barriers_kernel(int rounds) {
  for (int i = 0; i < rounds; ++i) __syncthreads();
}

__global__ void shuffles_kernel(float* out, int rounds) {
  float value = static_cast<float>(threadIdx.x);
  for (int i = 0; i < rounds; ++i) value = __shfl_xor_sync(kAllLanes, value, 1);
  out[threadIdx.x] = value;
}

}  // namespace

cudaError_t launch_product(const ProductParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((params.n + kTileN - 1) / kTileN),
                  static_cast<unsigned>((params.m + kTileM - 1) / kTileM));
  return dispatch_16bit(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(product_kernel<T>, grid, kThreads, sizeof(ProductShared<T>), stream, params);
  });
}

cudaError_t launch_reverse(float* rows, int blocks, int rounds, Fault fault, cudaStream_t stream) {
  return launch(reverse_kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, rows, rounds, fault);
}

cudaError_t launch_swap_neighbours(const float* in, float* out, Fault fault, cudaStream_t stream) {
  return launch(swap_neighbours_kernel, 1, kWarpThreads, 0, stream, in, out, fault);
}

cudaError_t launch_sums(const float* in, float* sums, float* largest, float* total, int rows, int size,
                        cudaStream_t stream) {
  return launch(sums_kernel, static_cast<unsigned>(rows), kThreads, 0, stream, in, sums, largest, total, size);
}

cudaError_t launch_collectives(int* out, cudaStream_t stream) {
  return launch(collectives_kernel, 1, kWarpThreads, 0, stream, out);
}

cudaError_t launch_fragments(uint32_t* out, cudaStream_t stream) {
  return launch(fragments_kernel, 1, kWarpThreads, 0, stream, out);
}

cudaError_t launch_mistake(float* out, int threads, int dynamic_bytes, Fault fault, cudaStream_t stream) {
  return launch(mistake_kernel, 1, static_cast<unsigned>(threads), static_cast<size_t>(dynamic_bytes), stream, out,
                threads, fault);
}

cudaError_t launch_barriers(int threads, int rounds, cudaStream_t stream) {
  return launch(barriers_kernel, 1, static_cast<unsigned>(threads), 0, stream, rounds);
}

cudaError_t launch_shuffles(float* out, int threads, int rounds, cudaStream_t stream) {
  return launch(shuffles_kernel, 1, static_cast<unsigned>(threads), 0, stream, out, rounds);
}

}  // namespace echo::test
