// Two planted mistakes, for the tools that must find them: a write beyond an allocation, and a race in shared memory.

#include <cstdio>
#include <cstring>

namespace echo {
namespace {

constexpr int kThreads = 256;

__global__ void beyond_the_end(float* data, int count) { data[count + threadIdx.x] = 1.0f; }

__global__ void no_barrier(float* data) {
  __shared__ float row[kThreads];
  row[threadIdx.x] = data[threadIdx.x];
  // Here a barrier is missing.
  data[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

}  // namespace
}  // namespace echo

int main(int count, char** words) {
  const bool race = count > 1 && std::strcmp(words[1], "race") == 0;
  float* data = nullptr;
  if (cudaMalloc(&data, echo::kThreads * sizeof(float)) != cudaSuccess) return 3;
  if (race) {
    echo::no_barrier<<<1, echo::kThreads>>>(data);
  } else {
    echo::beyond_the_end<<<1, echo::kThreads>>>(data, echo::kThreads);
  }
  // What the mistake does to the program is not what is asked.
  std::printf("ran: %s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
