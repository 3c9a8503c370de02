// What a device keeps and reaches as a member of groups: made once, outside of XLA, and never by a
// launch.
#pragma once

#include <cstdint>
#include <string>

#include "params/peers.h"
#include "status.h"

namespace flashmla::sm90 {

namespace peers {

// What the kernel is given, by value. A mailbox has, for each thread block, two regions in turn:
// [kMaxBlocks, 2, kRegionVectors].
struct Workspace {
  int rank, size;
  uint64_t timeout_ns;
  uint4* mailboxes[kMaxPeers];  // by rank, as this device addresses them
  uint32_t* epochs;             // [kMaxBlocks] calls that a block has taken part in
  uint32_t* failed;             // a member did not answer: all later words are NaN
  uint32_t* host_failed;        // the same in the host's memory
};

// The workspace of an open group on a device, every member of which is reached and none of which
// has failed to come.
Status find_workspace(const char* operation, int64_t group, int device, Workspace* workspace);

}  // namespace peers

// Makes the device a member: allocates its mailbox. `handle` is what another process reaches it by.
Status open_group(const Member& member, std::string* handle);

// Lets the device write to another member's mailbox: that of `peer_device` of this process, or, if
// that is -1, the one behind another process's handle.
Status reach_member(int64_t group, int device, int peer_rank, int peer_device,
                    const std::string& handle);

// Whether a member waited in vain for another.
bool has_failed(int64_t group, int device);

// Forgets the device's membership and frees its mailbox. No call may be running.
void close_group(int64_t group, int device);

}  // namespace flashmla::sm90
