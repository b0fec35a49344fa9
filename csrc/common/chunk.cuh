// Neighbouring elements that one thread owns: whole 16-byte vectors where they fill such, else accessed one by one.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/scalar.h"
#include "common/vec.cuh"

namespace echo {

inline constexpr int kVectorBytes = 16;

template <class T, int kWidth>
struct Chunk {
  static constexpr int kVector = kWidth * sizeof(T) % kVectorBytes == 0 ? kVectorBytes / sizeof(T) : 1;
  static constexpr int kVectors = kWidth / kVector;
  // Two 16-bit elements lie in one word, as in a register: taken apart only where they are used, they do not keep the
  // loads that follow waiting.
  using Word = std::conditional_t<sizeof(T) == 2 && kVector != 1, uint32_t, T>;
  static constexpr int kWords = kVectors * static_cast<int>(sizeof(Vec<T, kVector>) / sizeof(Word));
  static constexpr int kWordsEach = kWords / kVectors;
  Word words[kWords];

  static ECHO_DEVICE Chunk load(const T* address) {
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto vector = Vec<T, kVector>::load(address + i * kVector);
      memcpy(chunk.words + i * kWordsEach, &vector, sizeof vector);
    }
    return chunk;
  }

  ECHO_DEVICE void store(T* address) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Vec<T, kVector> vector;
      memcpy(&vector, words + i * kWordsEach, sizeof vector);
      vector.store(address + i * kVector);
    }
  }

  ECHO_DEVICE void to_floats(float* floats) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (std::is_same_v<Word, T>) {
        floats[i] = to_float(words[i]);
      } else {
        const float2 pair = unpack<T>(words[i]);
        floats[2 * i] = pair.x;
        floats[2 * i + 1] = pair.y;
      }
    }
  }

  ECHO_DEVICE void from_floats(const float* floats) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (std::is_same_v<Word, T>) {
        words[i] = from_float<T>(floats[i]);
      } else {
        words[i] = pack<T>(floats[2 * i], floats[2 * i + 1]);
      }
    }
  }
};

// Do rows `stride` elements apart, the first of which starts at `address`, all start on a vector?
template <class T>
bool vectors_fit(const void* address, int64_t stride) {
  return reinterpret_cast<uintptr_t>(address) % kVectorBytes == 0 &&
         stride * static_cast<int64_t>(sizeof(T)) % kVectorBytes == 0;
}

}  // namespace echo
