// For every layer l of kv [layers, 2, rows, heads, head_dim], rows memory | sink | ring:
//
//     kv[l, 0, sink]   = rotate(sink_k[l])    by the sink's anchor frames
//     kv[l, 0, memory] = rotate(memory_k)     by the memory's anchor frames; one copy serves all layers
//     kv[l, 1, memory] = memory_v
//
// Rounded to the sources' type or to float8. The three share one launch; what is not given has no part in it. A thread
// owns one chunk of channels of one token in all layers: its angles are looked up once, memory keys and values are read
// (and rotated) once and written layers times.

#include "common/chunk.cuh"
#include "common/launch.h"
#include "common/row_float8.cuh"
#include "kv_ring/reanchor.h"
#include "kv_ring/rotation.cuh"

namespace echo {
namespace {

constexpr int kThreads = 256;
// Layers that a thread has on their way at once. 30 and 40 layers (the released models') are whole batches.
constexpr int kBatch = 5;

enum class Part { kSinkKeys, kMemoryKeys, kMemoryValues };

// What is given, one for each y of the grid. Members, not an array: an array that a thread indexes would be copied to
// its local memory first.
struct Parts {
  Part first, second, third;
  unsigned count;

  void add(Part part) {
    (count == 0 ? first : count == 1 ? second : third) = part;
    ++count;
  }
  ECHO_DEVICE Part operator[](unsigned i) const { return i == 0 ? first : i == 1 ? second : third; }
};

// To element `at` of the buffer, rounded to T or to float8.
template <class T, int kWidth, bool kFloat8>
ECHO_DEVICE void store_values(const float (&values)[kWidth], void* kv, int64_t at) {
  if constexpr (kFloat8) {
    store_float8<kWidth>(values, static_cast<uint8_t*>(kv) + at);
  } else {
    Chunk<T, kWidth> chunk;
    chunk.from_floats(values);
    chunk.store(static_cast<T*>(kv) + at);
  }
}

template <class T, int kWidth, bool kFloat8>
__global__ void __launch_bounds__(kThreads) reanchor_kernel(ReanchorParams p, Parts parts) {
  const Part part = parts[blockIdx.y];
  const bool sink = part == Part::kSinkKeys, turning = part != Part::kMemoryValues;
  const int width = static_cast<int>(p.heads * p.head_dim), chunks = width / kWidth;
  const int index = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int token = index / chunks, channel = index % chunks * kWidth;
  if (token >= (sink ? p.sink_tokens : p.memory_tokens)) return;

  // The row in kv is the token's number in the angle table too: memory, then sink.
  const int row = token + (sink ? static_cast<int>(p.memory_tokens) : 0);
  Turn turns[kWidth / 2];
  if (turning) {
    const TokenTurns here = rotation_tables(p, p.temporal_anchor).at(row);
    const int pair = channel % static_cast<int>(p.head_dim) / 2;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) turns[i] = here[pair + i];
  }

  const T* source = static_cast<const T*>(sink ? p.sink_k : turning ? p.memory_k : p.memory_v);
  source += int64_t{token} * width + channel;
  const int64_t target = ((turning ? 0 : p.rows) + row) * width + channel;
  const int64_t source_stride = p.sink_tokens * width, target_stride = 2 * p.rows * width;  // from layer to layer

  float values[kWidth];
  if (!sink) {
    Chunk<T, kWidth>::load(source).to_floats(values);
    if (turning) rotate(values, turns);
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      store_values<T, kWidth, kFloat8>(values, p.kv, target + layer * target_stride);
    }
    return;
  }
  for (int64_t first = 0; first < p.layers; first += kBatch) {
    Chunk<T, kWidth> batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < p.layers) batch[i] = Chunk<T, kWidth>::load(source + (first + i) * source_stride);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= p.layers) continue;
      batch[i].to_floats(values);
      rotate(values, turns);
      store_values<T, kWidth, kFloat8>(values, p.kv, target + (first + i) * target_stride);
    }
  }
}

template <class T, int kWidth>
cudaError_t launch_as(const ReanchorParams& p, const Parts& parts, cudaStream_t stream) {
  const int64_t tokens = p.memory_tokens > p.sink_tokens ? p.memory_tokens : p.sink_tokens;
  const int64_t chunks = tokens * (p.heads * p.head_dim / kWidth);
  if (chunks > INT32_MAX - kThreads) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>((chunks + kThreads - 1) / kThreads), parts.count);
  const auto kernel = p.float8 ? reanchor_kernel<T, kWidth, true> : reanchor_kernel<T, kWidth, false>;
  return launch(kernel, grid, dim3(kThreads), 0, stream, p, parts);
}

}  // namespace

cudaError_t launch_reanchor(const ReanchorParams& params, cudaStream_t stream) {
  if (!turns_fit(params.temporal_anchor) || !turns_fit(params.spatial)) return cudaErrorInvalidValue;
  Parts parts = {};
  if (params.sink_k != nullptr) parts.add(Part::kSinkKeys);
  if (params.memory_k != nullptr) parts.add(Part::kMemoryKeys);
  if (params.memory_v != nullptr) parts.add(Part::kMemoryValues);
  if (parts.count == 0 || params.layers == 0) return cudaSuccess;

  return dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kWhole = kVectorBytes / static_cast<int>(sizeof(T));
    // Vectors may not straddle heads, so that a vector's pairs are neighbours in the tables too.
    const auto fits = params.float8 ? float8_chunks_fit<T> : vectors_fit<T>;
    const bool whole = fits(params.kv, params.head_dim) && vectors_fit<T>(params.sink_k, 0) &&
                       vectors_fit<T>(params.memory_k, 0) && vectors_fit<T>(params.memory_v, 0);
    return whole ? launch_as<T, kWhole>(params, parts, stream) : launch_as<T, 2>(params, parts, stream);
  });
}

}  // namespace echo
