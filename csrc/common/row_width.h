// How wide the rows may be that a block of threads keeps in registers (row.cuh). Without CUDA: bindings say it to
// users.

#pragma once

#include <cstdint>

namespace echo {

inline constexpr int kMaxRowThreads = 512;
// Channels that a thread holds. Eight are one 16-byte access of a 16-bit type; sixteen, for wide rows, are what fits
// into registers beside three float32 vectors of the same length.
inline constexpr int kUsualShare = 8;
inline constexpr int kLargestShare = 16;
// Where there is nothing beside them but their maximum.
inline constexpr int kGeluShare = 24;

// Of rows that are made of aligned 16-byte chunks, and of those that are not.
inline constexpr int64_t kWidestWholeRow = kMaxRowThreads * kLargestShare;
inline constexpr int64_t kWidestGeluRow = kMaxRowThreads * kGeluShare;
inline constexpr int64_t kWidestRow = kMaxRowThreads * kUsualShare;

}  // namespace echo
