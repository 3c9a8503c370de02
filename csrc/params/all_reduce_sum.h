// What all_reduce_sum is given.
#pragma once

#include <cstdint>

#include "params/dtype.h"

namespace flashmla {

constexpr int kMaxPeers = 8;  // devices of a group

// Sums x over the devices of a group. Each of them makes the same calls in the same order.
struct AllReduceSumParams {
  int64_t elements;
  DType dtype;
  int64_t group;  // which group, as it was opened
  int device;     // which of the process's devices this call is on
  const void* x;  // [elements]
  void* out;      // [elements], the same bits on all devices
};

// A device as a member of a group.
struct Member {
  int64_t group;
  int device;
  int rank, size;      // of the group: 0 <= rank < size <= kMaxPeers
  int64_t subgroup;    // the same number in all members of one group, and in no other's
  int64_t timeout_ns;  // how long a member waits for another before it gives up
};

}  // namespace flashmla
