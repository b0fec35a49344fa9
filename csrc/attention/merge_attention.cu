// out = sum over pieces of weight · output, where weight = exp(logsumexp - largest) / the sum of these over the pieces.
// outputs [pieces, tokens, heads, head_dim]: attention to a piece of the keys each; logsumexps float32 [pieces, heads,
// tokens]: of the scores there. The sum of a softmax is the sum of its pieces', so what comes out is attention to all.
// float32 inside.
//
// A block takes one token, a thread one chunk of a head of it at a time. All that a thread reads is asked for before
// anything is used: it reads two to four chunks and no more, and nothing else keeps the memory busy.

#include "attention/merge_attention.h"
#include "common/chunk.cuh"
#include "common/launch.h"
#include "common/reduce.cuh"

namespace echo {
namespace {

// 1536 channels in 16 bits are 192 chunks: one for each thread of six warps.
constexpr int kMaxThreads = 512;

template <class T, int kWidth, int kPieces>
__global__ void __launch_bounds__(kMaxThreads) merge_attention_kernel(MergeAttentionParams p) {
  const int64_t token = blockIdx.x;
  const int head_dim = static_cast<int>(p.head_dim), dim = static_cast<int>(p.heads) * head_dim;
  const T* outputs = static_cast<const T*>(p.outputs) + token * dim;
  T* out = static_cast<T*>(p.out) + token * dim;
  for (int channel = static_cast<int>(threadIdx.x) * kWidth; channel < dim;
       channel += static_cast<int>(blockDim.x) * kWidth) {
    Chunk<T, kWidth> chunks[kPieces];
    float weights[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) chunks[i] = Chunk<T, kWidth>::load(outputs + i * p.outputs_stride + channel);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      weights[i] = p.logsumexps[(i * p.heads + channel / head_dim) * p.tokens + token];
    }
    float largest = weights[0], sum = 0.0f;
#pragma unroll
    for (int i = 1; i < kPieces; ++i) largest = fmaxf(largest, weights[i]);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      weights[i] = expf(weights[i] - largest);
      sum += weights[i];
    }
    float merged[kWidth] = {};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      float values[kWidth];
      chunks[i].to_floats(values);
      const float weight = weights[i] / sum;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) merged[j] += weight * values[j];
    }
    Chunk<T, kWidth> result;
    result.from_floats(merged);
    result.store(out + channel);
  }
}

template <class T, int kWidth>
cudaError_t launch_as(const MergeAttentionParams& p, cudaStream_t stream) {
  const int64_t chunks = p.heads * p.head_dim / kWidth;
  const int64_t threads = (chunks + kWarpThreads - 1) / kWarpThreads * kWarpThreads;
  const dim3 grid(static_cast<unsigned>(p.tokens));
  const dim3 block(static_cast<unsigned>(threads < kMaxThreads ? threads : kMaxThreads));
  switch (p.pieces) {
    case 2:
      return launch(merge_attention_kernel<T, kWidth, 2>, grid, block, 0, stream, p);
    case 3:
      return launch(merge_attention_kernel<T, kWidth, 3>, grid, block, 0, stream, p);
    case kMostPieces:
      return launch(merge_attention_kernel<T, kWidth, kMostPieces>, grid, block, 0, stream, p);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_merge_attention(const MergeAttentionParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.heads * params.head_dim == 0) return cudaSuccess;
  return dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWhole = kVectorBytes / static_cast<int>(sizeof(T));
    const bool whole = params.head_dim % kWhole == 0 && vectors_fit<T>(params.outputs, params.outputs_stride) &&
                       vectors_fit<T>(params.out, params.head_dim);
    return whole ? launch_as<T, kWhole>(params, stream) : launch_as<T, 1>(params, stream);
  });
}

}  // namespace echo
