// x0 = x - sigma · flow, then x = x0, or x = (1 - sigma') · x0 + sigma' · noise; x, flow, noise [count] of one shape.
//
// float64 inside, as the reference has it: beside the reads and writes its arithmetic costs nothing. Each tensor is
// read once and x written once; at 832x480 that is 4.5 MB, so the launch itself is most of the time.

#include "common/launch.h"
#include "common/vec.cuh"
#include "sampler/flow_step.h"

namespace echo {
namespace {

constexpr int kThreads = 256;

// What one thread moves: 16 bytes of flow, and as many elements of x and noise, 16 bytes at a time.
template <typename T>
struct FlowStepTraits {
  static constexpr int kWidth = Vec<T>::kSize;
  static constexpr int kPart = Vec<float>::kSize;
  static_assert(kWidth % kPart == 0);
};

struct Step {
  double sigma;
  double next_sigma;
  bool renoise;

  __device__ float operator()(float x, float flow, float noise) const {
    const double clean = x - sigma * static_cast<double>(flow);
    return static_cast<float>(renoise ? (1 - next_sigma) * clean + next_sigma * noise : clean);
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) flow_step_kernel(FlowStepParams p) {
  using Traits = FlowStepTraits<T>;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * Traits::kWidth;
  if (first >= p.count) return;
  const Step step{p.sigmas[0], p.sigmas[1], p.noise != nullptr};
  const T* flow = static_cast<const T*>(p.flow) + first;
  if (first + Traits::kWidth > p.count) {  // the last few, which are no whole vector
    for (int64_t i = 0; i < p.count - first; ++i) {
      p.x[first + i] = step(p.x[first + i], to_float(flow[i]), step.renoise ? p.noise[first + i] : 0.0f);
    }
    return;
  }
  float flows[Traits::kWidth];
  Vec<T>::load(flow).to_floats(flows);
#pragma unroll
  for (int part = 0; part < Traits::kWidth; part += Traits::kPart) {
    Vec<float> x = Vec<float>::load(p.x + first + part);
    Vec<float> noise = x;
    if (step.renoise) noise = Vec<float>::load(p.noise + first + part);
#pragma unroll
    for (int i = 0; i < Traits::kPart; ++i) x[i] = step(x[i], flows[part + i], noise[i]);
    x.store(p.x + first + part);
  }
}

}  // namespace

cudaError_t launch_flow_step(const FlowStepParams& params, cudaStream_t stream) {
  return dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t block = int64_t{kThreads} * FlowStepTraits<T>::kWidth;
    const dim3 grid(static_cast<unsigned>((params.count + block - 1) / block));
    return launch(flow_step_kernel<T>, grid, dim3(kThreads), 0, stream, params);
  });
}

}  // namespace echo
