// out[4i .. 4i+3] = Box-Muller of the four words that Philox makes of the counter (i, step, block) and the key seed.
//
// Block and seed are read from device memory, so one captured launch serves every block of every video. float64 inside,
// as the reference has it. out is written once, 1.2 MB at 832x480: the launch itself is most of the time.

#include <cmath>

#include "common/launch.h"
#include "common/vec.cuh"
#include "sampler/counter_noise.h"
#include "sampler/philox.h"

namespace echo {
namespace {

// Small, as there are few: the 585 blocks of 832x480 spread evenly over the 132 multiprocessors of an H200.
constexpr int kThreads = 128;
constexpr double kTurn = 6.283185307179586476925286766559;

// The answers published with Random123 for these counters and keys: checked by every compiler that comes by.
constexpr bool is(PhiloxWords a, PhiloxWords b) {
  return a.words[0] == b.words[0] && a.words[1] == b.words[1] && a.words[2] == b.words[2] && a.words[3] == b.words[3];
}
static_assert(is(philox({{0, 0, 0, 0}}, 0, 0), {{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}}));
static_assert(is(philox({{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}}, 0xA4093822, 0x299F31D0),
                 {{0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}}));

// (word + 1/2) / 2^32 lies strictly between 0 and 1, so its logarithm is finite.
ECHO_DEVICE double uniform_of(uint32_t word) { return (word + 0.5) * 0x1p-32; }

ECHO_DEVICE void box_muller(uint32_t radius, uint32_t turn, float* pair) {
  const double length = sqrt(-2.0 * log(uniform_of(radius)));
  double sine, cosine;
  sincos(kTurn * uniform_of(turn), &sine, &cosine);
  pair[0] = static_cast<float>(length * cosine);
  pair[1] = static_cast<float>(length * sine);
}

__global__ void __launch_bounds__(kThreads) counter_noise_kernel(CounterNoiseParams p) {
  const int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t first = group * Vec<float>::kSize;
  if (first >= p.count) return;
  const uint64_t block = static_cast<uint64_t>(*p.block);
  const PhiloxWords random =
      philox({{static_cast<uint32_t>(group), p.step, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32)}},
             static_cast<uint32_t>(p.seed[0]), static_cast<uint32_t>(p.seed[1]));
  Vec<float> values;
  static_assert(Vec<float>::kSize == sizeof(random.words) / sizeof(uint32_t), "a store takes what a counter makes");
#pragma unroll
  for (int i = 0; i < Vec<float>::kSize; i += 2) box_muller(random.words[i], random.words[i + 1], values.values + i);
  if (first + Vec<float>::kSize <= p.count) {
    values.store(p.out + first);
  } else {
    for (int i = 0; i < p.count - first; ++i) p.out[first + i] = values[i];
  }
}

}  // namespace

cudaError_t launch_counter_noise(const CounterNoiseParams& params, cudaStream_t stream) {
  const int64_t groups = (params.count + Vec<float>::kSize - 1) / Vec<float>::kSize;
  const dim3 grid(static_cast<unsigned>((groups + kThreads - 1) / kThreads));
  return launch(counter_noise_kernel, grid, dim3(kThreads), 0, stream, params);
}

}  // namespace echo
