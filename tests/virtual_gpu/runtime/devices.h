// The one device, as it describes itself: an H100's limits.
#pragma once

#include <cstddef>

namespace virtual_gpu {

constexpr int kMajor = 9;
constexpr int kMinor = 0;
constexpr int kMultiprocessors = 132;
constexpr int kWarp = 32;
constexpr int kVersion = 13000;  // CUDA 13.0, of driver and runtime

constexpr size_t kSharedBytes = 48 << 10;
constexpr size_t kSharedBytesOnRequest = 227 << 10;
constexpr size_t kSharedBytesOfMultiprocessor = 228 << 10;

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxThreadsOfMultiprocessor = 2048;
constexpr unsigned kMaxGridX = 2147483647;
constexpr unsigned kMaxGridYZ = 65535;
constexpr unsigned kMaxBlockZ = 64;

}  // namespace virtual_gpu
