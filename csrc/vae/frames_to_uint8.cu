// out = round((clamp(video, -1, 1) + 1) · 127.5), ties to even; video [count] of any float type, out [count] bytes.
//
// One read and one write of the tensor: at 832x480, 12 frames of bfloat16 are 43 MB, 10 us of an H200's memory. A
// thread makes 16 bytes of output, so that the stores are as wide as they can be, from two or four vectors of input.

#include "common/launch.h"
#include "common/vec.cuh"
#include "vae/frames_to_uint8.h"

namespace echo {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = Vec<uint8_t>::kSize;

// A NaN becomes -1, then 0: there is no byte for it, and the runtime stops at a NaN in the latents.
__device__ inline uint8_t byte_of(float value) {
  const float clamped = fminf(fmaxf(value, -1.0f), 1.0f);
  return static_cast<uint8_t>(__float2int_rn((clamped + 1.0f) * 127.5f));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) frames_to_uint8_kernel(FramesToUint8Params p) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  if (first >= p.count) return;
  const T* video = static_cast<const T*>(p.video) + first;
  if (first + kWidth > p.count) {  // the last few, which are no whole vector
    for (int64_t i = 0; i < p.count - first; ++i) p.out[first + i] = byte_of(to_float(video[i]));
    return;
  }
  Vec<uint8_t> bytes;
#pragma unroll
  for (int part = 0; part < kWidth; part += Vec<T>::kSize) {
    float values[Vec<T>::kSize];
    Vec<T>::load(video + part).to_floats(values);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) bytes[part + i] = byte_of(values[i]);
  }
  bytes.store(p.out + first);
}

}  // namespace

cudaError_t launch_frames_to_uint8(const FramesToUint8Params& params, cudaStream_t stream) {
  return dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t block = int64_t{kThreads} * kWidth;
    const dim3 grid(static_cast<unsigned>((params.count + block - 1) / block));
    return launch(frames_to_uint8_kernel<T>, grid, dim3(kThreads), 0, stream, params);
  });
}

}  // namespace echo
