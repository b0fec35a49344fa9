// Barriers, shuffles, votes and atomics: what the threads of a block do together.
//
// The site of a call is a default argument, so that a message can name the kernel's line.

#pragma once

#include <cstring>
#include <type_traits>

#include "emulation/block.h"

#define ECHO_EMULATED_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace echo::emulation {

template <class T>
Deposit deposit_of(const T& value) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= sizeof(Deposit));
  Deposit deposit{};
  std::memcpy(&deposit, &value, sizeof(T));
  return deposit;
}

template <class T>
T value_of(const Deposit& deposit) {
  T value;
  std::memcpy(&value, &deposit, sizeof(T));
  return value;
}

// The value of lane source; a lane outside the group of width that it would come from keeps its own.
template <class T>
T shuffle(uint32_t mask, T value, int source, bool in_group, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  Meeting& meeting = meet(mask, Operation::kShuffle, site, deposit_of(value));
  if (in_group && (meeting.expected >> source & 1) == 0) fail("a shuffle from a lane that takes no part in it");
  const T result = in_group ? value_of<T>(meeting.deposits[source]) : value;
  leave(meeting);
  return result;
}

inline void collect_votes(Meeting& meeting) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (meeting.expected >> lane & 1) ballot |= static_cast<uint32_t>(meeting.deposits[lane].words[0] != 0) << lane;
  }
  for (Deposit& deposit : meeting.deposits) deposit.words[0] = ballot;
}

struct Vote {
  uint32_t ballot, voters;
};

inline Vote vote(uint32_t mask, bool predicate, Site site) {
  Meeting& meeting = meet(mask, Operation::kVote, site, deposit_of(uint32_t{predicate}), collect_votes);
  const Vote result{meeting.deposits[current_thread->lane].words[0], meeting.expected};
  leave(meeting);
  return result;
}

}  // namespace echo::emulation

inline void __syncthreads(ECHO_EMULATED_SITE) { echo::emulation::sync_threads({file, line}); }

inline void __syncwarp(unsigned mask = 0xFFFFFFFF, ECHO_EMULATED_SITE) {
  using namespace echo::emulation;
  leave(meet(mask, Operation::kSyncWarp, {file, line}, Deposit{}));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, ECHO_EMULATED_SITE) {
  const int lane = echo::emulation::current_thread->lane, first = lane & ~(width - 1);
  return echo::emulation::shuffle(mask, value, first + (source & (width - 1)), true, {file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, ECHO_EMULATED_SITE) {
  const int lane = echo::emulation::current_thread->lane, source = lane ^ lane_mask;
  // As in hardware, a lane may read from groups before its own, not from those behind.
  return echo::emulation::shuffle(mask, value, source, source < (lane & ~(width - 1)) + width, {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, ECHO_EMULATED_SITE) {
  const int lane = echo::emulation::current_thread->lane, source = lane + static_cast<int>(delta);
  return echo::emulation::shuffle(mask, value, source, source < (lane & ~(width - 1)) + width, {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, ECHO_EMULATED_SITE) {
  const int lane = echo::emulation::current_thread->lane, source = lane - static_cast<int>(delta);
  return echo::emulation::shuffle(mask, value, source, source >= (lane & ~(width - 1)), {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, ECHO_EMULATED_SITE) {
  return echo::emulation::vote(mask, predicate != 0, {file, line}).ballot;
}

inline int __any_sync(unsigned mask, int predicate, ECHO_EMULATED_SITE) {
  return echo::emulation::vote(mask, predicate != 0, {file, line}).ballot != 0;
}

inline int __all_sync(unsigned mask, int predicate, ECHO_EMULATED_SITE) {
  const auto vote = echo::emulation::vote(mask, predicate != 0, {file, line});
  return vote.ballot == vote.voters;
}

// Atomic for the host too, should blocks be spread over its threads. Only the address says what T is, so that the value
// converts as in a call of CUDA's overloads.
template <class T>
T atomicAdd(T* address, std::enable_if_t<true, T> value) {
  if constexpr (std::is_integral<T>::value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  } else {
    static_assert(std::is_same<T, float>::value || std::is_same<T, double>::value);
    T seen, sum;
    __atomic_load(address, &seen, __ATOMIC_RELAXED);
    do {
      sum = seen + value;
    } while (!__atomic_compare_exchange(address, &seen, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return seen;
  }
}
