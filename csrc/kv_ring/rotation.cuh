// The 3-D rotation: which angle a channel pair of a token is turned by, and the turn itself.
//
// A head has temporal_pairs pairs that turn with the token's frame, then spatial_pairs that turn with its place in the
// frame. Adjacent channels are the real and the imaginary part of a pair.

#pragma once

#include <cstdint>

#include "common/scalar.h"

namespace echo {

// What a table holds for each pair, side by side: one 8-byte access.
struct alignas(8) Turn {
  float cos = 1.0f;
  float sin = 0.0f;
};

// The product is formed and reduced in float64: at frame 2^31 it still has 22 bits behind the point.
ECHO_DEVICE Turn turn_of(int64_t frame, double inverse_frequency) {
  const double angle = static_cast<double>(frame) * inverse_frequency;
  return {static_cast<float>(cos(angle)), static_cast<float>(sin(angle))};
}

// The turns of one token, by the number of the pair in a head.
struct TokenTurns {
  const Turn* temporal;  // [temporal_pairs]
  const Turn* spatial;   // [spatial_pairs]
  int temporal_pairs;

  ECHO_DEVICE Turn operator[](int pair) const {
    return pair < temporal_pairs ? temporal[pair] : spatial[pair - temporal_pairs];
  }
};

struct RotationTables {
  const Turn* temporal;  // [frames, temporal_pairs]
  const Turn* spatial;   // [tokens_per_frame, spatial_pairs]
  int tokens_per_frame;
  int temporal_pairs;
  int spatial_pairs;

  // Tokens are counted from the start of the temporal table's first frame.
  ECHO_DEVICE TokenTurns at(int token) const {
    const int frame = token / tokens_per_frame, place = token % tokens_per_frame;
    return {temporal + frame * temporal_pairs, spatial + place * spatial_pairs, temporal_pairs};
  }
};

// From any params struct that names spatial and the counts as QkvNormRopeStoreParams does.
template <class Params>
ECHO_DEVICE RotationTables rotation_tables(const Params& p, const float* temporal) {
  return {reinterpret_cast<const Turn*>(temporal), reinterpret_cast<const Turn*>(p.spatial),
          static_cast<int>(p.tokens_per_frame), static_cast<int>(p.temporal_pairs), static_cast<int>(p.spatial_pairs)};
}

// Can a table be read a turn at a time?
inline bool turns_fit(const float* table) { return reinterpret_cast<uintptr_t>(table) % sizeof(Turn) == 0; }

template <int kValues>
ECHO_DEVICE void rotate(float (&values)[kValues], const Turn (&turns)[kValues / 2]) {
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    const float real = values[2 * i], imaginary = values[2 * i + 1];
    values[2 * i] = real * turns[i].cos - imaginary * turns[i].sin;
    values[2 * i + 1] = real * turns[i].sin + imaginary * turns[i].cos;
  }
}

}  // namespace echo
