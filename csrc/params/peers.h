// Devices that reach each other's memory.
#pragma once

#include <cstdint>

namespace flashmla {

constexpr int kMaxPeers = 8;  // devices of a group

// A device as a member of a group.
struct Member {
  int64_t group;
  int device;
  int rank, size;      // of the group: 0 <= rank < size <= kMaxPeers
  int64_t subgroup;    // the same number in all members of one group, and in no other's
  int64_t timeout_ns;  // how long a member waits for another before it gives up
};

}  // namespace flashmla
