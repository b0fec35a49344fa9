// The order in which threads and blocks run, drawn from a seed.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace echo::emulation {

// splitmix64: a good stream from any seed, zero too.
struct Random {
  uint64_t state;
  uint32_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return static_cast<uint32_t>(z >> 32);
  }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>((uint64_t{next()} * bound) >> 32); }

  template <class T>
  void shuffle(T* first, size_t count) {
    for (size_t i = count; i > 1; --i) std::swap(first[i - 1], first[below(static_cast<uint32_t>(i))]);
  }
};

}  // namespace echo::emulation
