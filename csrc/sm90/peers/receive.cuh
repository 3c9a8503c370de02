// What a thread does with its slots: sees what has come, waits for the rest, leaves them empty.
#pragma once

#include "sm90/peers/mailbox.cuh"
#include "sm90/peers/region.h"
#include "sm90/peers/workspace.h"

namespace flashmla::sm90::peers {

// A block's view of its region in every mailbox: slots [2 rounds, size, chunk].
struct Region {
  const Workspace& workspace;
  int64_t begin;  // of the region in any mailbox, in vectors
  int64_t chunk;

  __device__ __forceinline__ uint4* slot(int mailbox, int round, int from, int64_t i) const {
    return workspace.mailboxes[mailbox] + begin + (round * workspace.size + from) * chunk + i;
  }
};

// A block's turn: calls alternate between two regions.
struct Turn {
  uint32_t* epoch;  // this block's count of calls
  uint32_t now;     // what it is in this one
  bool failed;      // the group has, in this call or an earlier one
  Region region;
};

__device__ __forceinline__ Turn begin_turn(const Workspace& workspace, int64_t chunk) {
  uint32_t* epoch = workspace.epochs + blockIdx.x;
  const uint32_t now = *static_cast<volatile uint32_t*>(epoch);
  const bool failed = *static_cast<volatile uint32_t*>(workspace.failed) != 0;
  return {epoch, now, failed, {workspace, (blockIdx.x * 2 + now % 2) * kRegionVectors, chunk}};
}

__device__ __forceinline__ void end_turn(const Turn& turn) {
  __syncthreads();  // all threads have read the epoch
  if (threadIdx.x == 0) *turn.epoch = turn.now + 1;
}

// Waits for the words of a slot that was found incomplete. Gives up after the timeout: from then on
// every word of the group is NaN, here at once, at the other devices as they receive it.
__device__ __forceinline__ uint4 await(const uint4* slot, uint64_t timeout_ns, uint32_t* failed,
                                       uint32_t* host_failed) {
  const uint64_t since = nanoseconds();
  uint4 v;
  for (int polls = 1; !is_complete(v = load_slot(slot)); ++polls) {
    if (polls % 256 != 0) continue;
    const bool late = nanoseconds() - since > timeout_ns;
    if (late) {
      *static_cast<volatile uint32_t*>(failed) = 1;
      *static_cast<volatile uint32_t*>(host_failed) = 1;
    }
    if (late || *static_cast<volatile uint32_t*>(failed) != 0) return kNaNs;
  }
  return v;
}

// What the others have sent, or kEmpty: parts [size]. All loads are under way at once.
template <int kSize>
__device__ __forceinline__ void look(const Region& region, int round, int64_t i,
                                     uint4 (&parts)[kSize]) {
  const int size = region.workspace.size, rank = region.workspace.rank;
#pragma unroll
  for (int from = 0; from < kSize; ++from) {
    if (from < size && from != rank) parts[from] = load_slot(region.slot(rank, round, from, i));
  }
}

// Waits for what look did not find, and leaves the slot empty.
__device__ __forceinline__ uint4 take(const Region& region, int round, int from, int64_t i,
                                      uint4 found) {
  const Workspace& workspace = region.workspace;
  uint4* slot = region.slot(workspace.rank, round, from, i);
  if (!is_complete(found)) {
    found = await(slot, workspace.timeout_ns, workspace.failed, workspace.host_failed);
  }
  empty(slot);
  return found;
}

// Another device, a different one for each at every step from 1 on.
__device__ __forceinline__ int other(const Workspace& workspace, int step) {
  const int rank = workspace.rank + step;
  return rank < workspace.size ? rank : rank - workspace.size;
}

}  // namespace flashmla::sm90::peers
