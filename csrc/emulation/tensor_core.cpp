// See tensor_core.h.

#include "emulation/tensor_core.h"

#include <cstring>
#include <string>

#include "emulation/half.h"
#include "emulation/warp.h"

namespace echo::emulation {

namespace {

constexpr size_t kCopyBytes = 16;
constexpr int kMatrixRows = 8, kRowBytes = 16;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

template <class T>
float value_of_bits(uint16_t bits);
template <>
float value_of_bits<__nv_bfloat16>(uint16_t bits) {
  return bfloat16_value(bits);
}
template <>
float value_of_bits<__half>(uint16_t bits) {
  return half_value(bits);
}

const unsigned char* row_named_by(const Meeting& meeting, int lane) {
  return value_of<const unsigned char*>(meeting.deposits[lane]);
}

// Replaces the addresses that lanes brought by the registers they take away.
template <int kMatrices, bool kTransposed>
void load_matrices(Meeting& meeting) {
  uint16_t matrices[kMatrices][kMatrixRows][8];
  for (int i = 0; i < kMatrices; ++i) {
    for (int row = 0; row < kMatrixRows; ++row) {
      std::memcpy(matrices[i][row], row_named_by(meeting, i * kMatrixRows + row), kRowBytes);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kMatrices; ++i) {
      const uint16_t low = kTransposed ? matrices[i][2 * t][g] : matrices[i][g][2 * t];
      const uint16_t high = kTransposed ? matrices[i][2 * t + 1][g] : matrices[i][g][2 * t + 1];
      meeting.deposits[lane].words[i] = low | uint32_t{high} << 16;
    }
  }
}

constexpr int kN = 8, kK = 16;
constexpr int kAWords = 4;

// A row of B or C, in vector registers of whatever width the host has.
typedef float Row __attribute__((vector_size(kN * sizeof(float))));

template <class T>
void widen(uint32_t pair, float* low, float* high) {
  *low = value_of_bits<T>(static_cast<uint16_t>(pair));
  *high = value_of_bits<T>(static_cast<uint16_t>(pair >> 16));
}

// The whole tile at once, by the lane that comes last, so that each element is widened once. Little of it lies on the
// stack: another lane is last each time, and its stack is not in the nearest cache.
template <class T>
void multiply_tile(Meeting& meeting) {
  float b[kK][kN];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const uint32_t* words = meeting.deposits[lane].words + kAWords;
    widen<T>(words[0], &b[2 * t][g], &b[2 * t + 1][g]);
    widen<T>(words[1], &b[2 * t + 8][g], &b[2 * t + 9][g]);
  }
  for (int g = 0; g < 8; ++g) {
    // Rows g and g + 8 of A, and of C, lie in the same four lanes.
    Deposit* lanes = &meeting.deposits[4 * g];
    float upper[kK], lower[kK];
    for (int t = 0; t < 4; ++t) {
      widen<T>(lanes[t].words[0], &upper[2 * t], &upper[2 * t + 1]);
      widen<T>(lanes[t].words[1], &lower[2 * t], &lower[2 * t + 1]);
      widen<T>(lanes[t].words[2], &upper[2 * t + 8], &upper[2 * t + 9]);
      widen<T>(lanes[t].words[3], &lower[2 * t + 8], &lower[2 * t + 9]);
    }
    Row upper_sum = {}, lower_sum = {};
    for (int k = 0; k < kK; ++k) {
      Row row;
      std::memcpy(&row, b[k], sizeof row);
      upper_sum += upper[k] * row;
      lower_sum += lower[k] * row;
    }
    for (int t = 0; t < 4; ++t) {
      const float sums[4] = {upper_sum[2 * t], upper_sum[2 * t + 1], lower_sum[2 * t], lower_sum[2 * t + 1]};
      std::memcpy(lanes[t].words, sums, sizeof sums);
    }
  }
}

}  // namespace

void copy_async(void* to, const void* from) {
  check_shared(to, kCopyBytes, "cp.async to a target");
  check_aligned(to, kCopyBytes, "cp.async to a target");
  check_aligned(from, kCopyBytes, "cp.async from a source");
  std::memset(to, 0xFF, kCopyBytes);
  current_thread->copies.push_back({to, from, kCopyBytes});
}

void perform(const PendingCopy& copy) {
  if (copy.from == nullptr) {
    std::memset(copy.to, 0, copy.bytes);
  } else {
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

void commit_copies() { current_thread->group_ends.push_back(current_thread->copies.size()); }

void wait_copies(size_t allowed) {
  Thread& self = *current_thread;
  if (self.group_ends.size() <= allowed) return;
  const size_t groups = self.group_ends.size() - allowed, finished = self.group_ends[groups - 1];
  if (finished > 0) self.writes_unfenced = true;
  for (size_t i = 0; i < finished; ++i) perform(self.copies[i]);
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<ptrdiff_t>(finished));
  self.group_ends.erase(self.group_ends.begin(), self.group_ends.begin() + static_cast<ptrdiff_t>(groups));
  for (size_t& end : self.group_ends) end -= finished;
}

template <int kMatrices, bool kTransposed>
void load_matrix(uint32_t (&registers)[kMatrices], const void* row, Site site) {
  // Lanes beyond the last matrix name nothing.
  if (current_thread->lane < kMatrices * kMatrixRows) {
    check_shared(row, kRowBytes, "ldmatrix of a row");
    check_aligned(row, kRowBytes, "ldmatrix of a row");
  }
  Meeting& meeting =
      meet(kAllLanes, Operation::kLoadMatrix, site, deposit_of(row), load_matrices<kMatrices, kTransposed>);
  std::memcpy(registers, meeting.deposits[current_thread->lane].words, sizeof registers);
  leave(meeting);
}

template void load_matrix<4, false>(uint32_t (&)[4], const void*, Site);
template void load_matrix<4, true>(uint32_t (&)[4], const void*, Site);
template void load_matrix<2, false>(uint32_t (&)[2], const void*, Site);
template void load_matrix<2, true>(uint32_t (&)[2], const void*, Site);

template <class T>
void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  Deposit deposit;  // of which six words are used
  std::memcpy(deposit.words, a, sizeof a);
  std::memcpy(deposit.words + kAWords, b, sizeof b);
  Meeting& meeting = meet(kAllLanes, Operation::kMultiply, site, deposit, multiply_tile<T>);
  float sums[4];
  std::memcpy(sums, meeting.deposits[current_thread->lane].words, sizeof sums);
  leave(meeting);
  for (int i = 0; i < 4; ++i) c[i] += sums[i];
}

template void multiply_accumulate<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], Site);
template void multiply_accumulate<__half>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], Site);

}  // namespace echo::emulation
