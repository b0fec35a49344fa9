// Words for what a kernel did wrong.

#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "emulation/block.h"

namespace echo::emulation {

inline std::string place(const char* name, unsigned x, unsigned y, unsigned z) {
  return std::string(name) + " (" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
}

inline std::string place(const Thread& thread) {
  return place("thread", thread.index.x, thread.index.y, thread.index.z);
}

inline std::string place(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

inline bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

inline const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kSyncThreads:
      return "__syncthreads";
    case Operation::kSyncWarp:
      return "__syncwarp";
    case Operation::kShuffle:
      return "a shuffle";
    case Operation::kVote:
      return "a vote";
    case Operation::kLoadMatrix:
      return "ldmatrix";
    case Operation::kMultiply:
      return "mma";
    case Operation::kWarpgroupMultiply:
      return "wgmma";
    case Operation::kBarrier:
      return "an mbarrier's phase";
    case Operation::kNone:
      break;
  }
  return "nothing";
}

// What no GPU would launch, and why; empty where one would.
inline std::string describe_refusal(dim3 grid, dim3 size, size_t dynamic_bytes) {
  constexpr unsigned kMaxGridX = 0x7FFFFFFF, kMaxGridYZ = 65535, kMaxSizeZ = 64;
  const uint64_t threads = uint64_t{size.x} * size.y * size.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || size.z > kMaxSizeZ) {
    return place("a block of", size.x, size.y, size.z) + " threads, of at least 1 and at most " +
           std::to_string(kMaxThreads);
  }
  if (blocks == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    return place("a grid of", grid.x, grid.y, grid.z) + " blocks, of at least 1 and at most (2^31-1,65535,65535)";
  }
  if (dynamic_bytes > kMaxSharedBytes) {
    return std::to_string(dynamic_bytes) + " bytes of dynamic shared memory, of at most " +
           std::to_string(kMaxSharedBytes);
  }
  return "";
}

// What was still on its way when all threads had ended; empty where nothing was.
inline std::string describe_forgotten(const Block& block) {
  size_t left = 0;
  for (const auto& state : block.barriers) left += state->copies.size();
  return left == 0 ? "" : std::to_string(left) + " bulk copies were issued and never waited for";
}

// Who waits for whom, when no thread of the block can go on: threads in groups that wait, or ended, at one place.
inline std::string describe_deadlock(const std::vector<std::unique_ptr<Thread>>& threads, size_t count) {
  struct Group {
    const Thread* first;
    size_t count;
  };
  std::vector<Group> groups;
  for (size_t i = 0; i < count; ++i) {
    const Thread& thread = *threads[i];
    const auto belongs = [&](const Group& group) {
      const Thread& other = *group.first;
      return other.ended == thread.ended &&
             (thread.ended || (other.waits_in == thread.waits_in && same(other.waits_at, thread.waits_at)));
    };
    const auto found = std::find_if(groups.begin(), groups.end(), belongs);
    if (found == groups.end()) {
      groups.push_back({&thread, 1});
    } else {
      ++found->count;
    }
  }
  std::string text = "deadlock: ";
  for (const Group& group : groups) {
    if (&group != groups.data()) text += "; ";
    text += std::to_string(group.count) + " of " + std::to_string(count) + " threads (the first is " +
            place(*group.first) + ") ";
    text += group.first->ended
                ? "have ended"
                : std::string("wait in ") + name_of(group.first->waits_in) + " at " + place(group.first->waits_at);
  }
  return text;
}

}  // namespace echo::emulation
