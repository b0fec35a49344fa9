// Philox 4x32 with 10 rounds (Salmon et al., SC 2011): four random 32-bit words from a counter and a key, no state.
// Integers only, so host and GPU agree to the bit.

#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace echo {

struct PhiloxWords {
  uint32_t words[4];
};

ECHO_HOST_DEVICE constexpr PhiloxWords philox(PhiloxWords counter, uint32_t key_low, uint32_t key_high) {
  constexpr int kRounds = 10;
  constexpr uint64_t kMultipliers[] = {0xD2511F53, 0xCD9E8D57};
  constexpr uint32_t kKeySteps[] = {0x9E3779B9, 0xBB67AE85};
  PhiloxWords c = counter;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t first = kMultipliers[0] * c.words[0], second = kMultipliers[1] * c.words[2];
    c = {{static_cast<uint32_t>(second >> 32) ^ c.words[1] ^ key_low, static_cast<uint32_t>(second),
          static_cast<uint32_t>(first >> 32) ^ c.words[3] ^ key_high, static_cast<uint32_t>(first)}};
    key_low += kKeySteps[0];
    key_high += kKeySteps[1];
  }
  return c;
}

}  // namespace echo
