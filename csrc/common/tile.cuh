// Tiles of 16-bit values in shared memory, and the fragments that the tensor cores take from them.
//
// A tile is kRows x kColumns, row-major, moved in chunks of 16 bytes. ldmatrix reads one chunk of each of 8 successive
// rows at a time; were these a row apart in memory they would all fall on the same banks. So chunk c of row r lies
// where chunk c ^ swizzle(r) would, which spreads them over all 32 banks, and nothing is padded.

#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

namespace echo {

inline constexpr int kChunk = 8;  // values in a chunk

// Of mma.m16n8k16: the left operand is 16 rows by 16 of depth, the right one and the accumulator have 8 columns, and a
// quad of lanes shares a row of the accumulator.
inline constexpr int kFragment = 16;
inline constexpr int kFragmentColumns = 8;
inline constexpr int kQuad = 4;

template <typename T, int kRows_, int kColumns_>
struct alignas(128) Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kChunks = kColumns / kChunk;  // in a row
  static constexpr int kBanksOfChunks = 8;           // 128 bytes: every bank once
  static_assert(sizeof(T) == 2 && kChunks >= 4 && (kChunks & (kChunks - 1)) == 0, "64, 128, 256 ... bytes a row");

  T values[kRows * kColumns];

  // Where a chunk lies. It repeats every 8 rows: offset(row + 8, c) = offset(row, c) + 8 * kColumns.
  static ECHO_DEVICE int offset(int row, int chunk) {
    constexpr int kRowsAcross = kChunks < kBanksOfChunks ? kBanksOfChunks / kChunks : 1;
    constexpr int kPatterns = kBanksOfChunks / kRowsAcross;
    return row * kColumns + (chunk ^ (row / kRowsAcross % kPatterns)) * kChunk;
  }

  // Chunk `chunk` + 2i of row `row` + 8j for a chunk of 0 or 1, from 16i columns and 8j rows. As i only touches bits of
  // the offset that a chunk of 0 or 1 does not, a lane's part is computed once and an exclusive or does the rest.
  ECHO_DEVICE T* at(int row, int chunk, int rows_on, int columns_on) {
    return values + rows_on * kColumns + (offset(row, chunk) ^ columns_on);
  }
};

// The left operand: rows row .. row + 15, depth depth .. depth + 15 of a tile that holds it as [rows, depth].
template <typename TileT>
ECHO_DEVICE void load_left(TileT& tile, int row, int depth, uint32_t (&fragment)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  load_matrix_x4(fragment, tile.at(lane % 16, lane / 16, row, depth));
}

// The right operand for 16 columns, two fragments of 8, of a tile that holds it transposed, as [columns, depth].
template <typename TileT>
ECHO_DEVICE void load_right_transposed(TileT& tile, int column, int depth, uint32_t (&fragments)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  load_matrix_x4(fragments, tile.at(lane % 8 + lane / 16 * 8, lane / 8 % 2, column, depth));
}

// The right operand for 16 columns, two fragments of 8, of a tile that holds it as [depth, columns].
template <typename TileT>
ECHO_DEVICE void load_right(TileT& tile, int depth, int column, uint32_t (&fragments)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  load_matrix_x4_transposed(fragments, tile.at(lane % 16, lane / 16, depth, column));
}

// sums[m][n] and sums[m][n + 1] += left[m] right, for the two fragments of 8 columns that the loads above give.
template <typename T, int kRowFragments, int kColumnFragments>
ECHO_DEVICE void multiply_pair(float (&sums)[kRowFragments][kColumnFragments][4],
                               const uint32_t (&left)[kRowFragments][4], const uint32_t (&right)[4], int n) {
#pragma unroll
  for (int m = 0; m < kRowFragments; ++m) {
    multiply_accumulate<T>(sums[m][n], left[m], {right[0], right[1]});
    multiply_accumulate<T>(sums[m][n + 1], left[m], {right[2], right[3]});
  }
}

// 8 floats, beside a chunk of 16-bit values; address is a multiple of 16 bytes.
ECHO_DEVICE void load_floats(const float* address, float (&floats)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; i += Vec<float>::kSize) {
    const auto four = Vec<float>::load(address + i);
#pragma unroll
    for (int j = 0; j < Vec<float>::kSize; ++j) floats[i + j] = four[j];
  }
}

// Do `rows` rows, `stride` 16-bit elements apart, all start on a chunk? Of a single row the stride says nothing.
inline bool rows_start_on_chunks(const void* first, int64_t rows, int64_t stride) {
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && (rows < 2 || stride % kChunk == 0);
}

}  // namespace echo
