#include "sm90/peers/workspace.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "sm90/host/launch.h"
#include "sm90/peers/region.h"

namespace flashmla::sm90 {
namespace peers {
namespace {

constexpr const char* kWhat = "connect_peers";

struct Membership {
  Workspace workspace = {};
  int reached = 1;            // members, itself included
  std::vector<void*> opened;  // other processes' mailboxes
};

std::mutex mutex;
std::map<std::pair<int64_t, int>, Membership> memberships;  // by group and device

// Makes a device current while it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    cudaGetDevice(&before_);
    cudaSetDevice(device);
  }
  ~CurrentDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

void release(Membership& membership) {
  Workspace& workspace = membership.workspace;
  for (void* mailbox : membership.opened) cudaIpcCloseMemHandle(mailbox);
  cudaFree(workspace.mailboxes[workspace.rank]);
  cudaFree(workspace.epochs);
  cudaFreeHost(workspace.host_failed);
  cudaGetLastError();
}

// Mailbox and epochs, in their first state before anybody is told of them.
cudaError_t allocate(Workspace& workspace) {
  uint4*& mailbox = workspace.mailboxes[workspace.rank];
  cudaError_t error = cudaMalloc(&mailbox, kMailboxBytes);
  const size_t words = kMaxBlocks + 1;
  if (error == cudaSuccess) error = cudaMalloc(&workspace.epochs, words * sizeof(uint32_t));
  if (error == cudaSuccess) {
    error = cudaHostAlloc(&workspace.host_failed, sizeof(uint32_t), cudaHostAllocPortable);
  }
  if (error != cudaSuccess) return error;
  workspace.failed = workspace.epochs + kMaxBlocks;
  *workspace.host_failed = 0;
  error = cudaMemset(mailbox, 0xff, kMailboxBytes);
  if (error == cudaSuccess) error = cudaMemset(workspace.epochs, 0, words * sizeof(uint32_t));
  return error == cudaSuccess ? cudaDeviceSynchronize() : error;
}

// Peer access from the current device.
cudaError_t enable_peer_access(int device, int peer) {
  int can = 0;
  cudaError_t error = cudaDeviceCanAccessPeer(&can, device, peer);
  if (error != cudaSuccess) return error;
  if (!can) return cudaErrorPeerAccessUnsupported;
  error = cudaDeviceEnablePeerAccess(peer, 0);
  if (error != cudaErrorPeerAccessAlreadyEnabled) return error;
  cudaGetLastError();  // XLA has enabled it
  return cudaSuccess;
}

}  // namespace

Status find_workspace(const char* operation, int64_t group, int device, Workspace* workspace) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = memberships.find({group, device});
  if (found == memberships.end() || found->second.reached != found->second.workspace.size) {
    return Status::FailedPrecondition(
        std::string(operation) + ": device " + std::to_string(device) +
        " is not connected to the others of its group: call connect_peers with the mesh that "
        "shard_map is given, in every process");
  }
  if (*static_cast<volatile uint32_t*>(found->second.workspace.host_failed) != 0) {
    return Status::Internal(std::string(operation) +
                            ": a device of the group did not take part in an earlier call within "
                            "the timeout of connect_peers; every result since then is NaN");
  }
  *workspace = found->second.workspace;
  return Status::Ok();
}

}  // namespace peers

using namespace peers;

Status open_group(const Member& member, std::string* handle) {
  std::lock_guard<std::mutex> lock(mutex);
  if (member.size < 2 || member.size > kMaxPeers || member.rank < 0 || member.rank >= member.size) {
    return Status::InvalidArgument("a group must have between 2 and 8 members, got rank " +
                                   std::to_string(member.rank) + " of " +
                                   std::to_string(member.size));
  }
  const auto key = std::pair(member.group, member.device);
  if (memberships.count(key)) return Status::FailedPrecondition("the group is open already");
  const CurrentDevice current(member.device);
  if (Status status = require_hopper(); !status.ok()) return status;
  Membership membership;
  membership.workspace.rank = member.rank;
  membership.workspace.size = member.size;
  membership.workspace.timeout_ns = member.timeout_ns;
  cudaIpcMemHandle_t ipc;
  cudaError_t error = allocate(membership.workspace);
  if (error == cudaSuccess) {
    error = cudaIpcGetMemHandle(&ipc, membership.workspace.mailboxes[member.rank]);
  }
  if (error != cudaSuccess) {
    release(membership);
    return to_status(error, kWhat);
  }
  handle->assign(reinterpret_cast<const char*>(&ipc), sizeof(ipc));
  memberships.emplace(key, std::move(membership));
  return Status::Ok();
}

Status reach_member(int64_t group, int device, int peer_rank, int peer_device,
                    const std::string& handle) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = memberships.find({group, device});
  if (found == memberships.end()) return Status::FailedPrecondition("the group is not open");
  Membership& membership = found->second;
  Workspace& workspace = membership.workspace;
  if (peer_rank < 0 || peer_rank >= workspace.size || workspace.mailboxes[peer_rank]) {
    return Status::InvalidArgument("rank " + std::to_string(peer_rank) + " is no other member's");
  }
  const CurrentDevice current(device);
  if (peer_device >= 0) {
    const auto peer = memberships.find({group, peer_device});
    if (peer == memberships.end()) return Status::FailedPrecondition("the member is not open");
    const cudaError_t error = enable_peer_access(device, peer_device);
    if (error != cudaSuccess) return to_status(error, kWhat);
    workspace.mailboxes[peer_rank] = peer->second.workspace.mailboxes[peer_rank];
  } else {
    cudaIpcMemHandle_t ipc;
    if (handle.size() != sizeof(ipc)) return Status::InvalidArgument("not an IPC handle");
    std::memcpy(&ipc, handle.data(), sizeof(ipc));
    void* mailbox = nullptr;
    const cudaError_t error = cudaIpcOpenMemHandle(&mailbox, ipc, cudaIpcMemLazyEnablePeerAccess);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return to_status(error, kWhat);
    }
    membership.opened.push_back(mailbox);
    workspace.mailboxes[peer_rank] = static_cast<uint4*>(mailbox);
  }
  ++membership.reached;
  return Status::Ok();
}

bool has_failed(int64_t group, int device) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = memberships.find({group, device});
  if (found == memberships.end()) return false;
  return *static_cast<volatile uint32_t*>(found->second.workspace.host_failed) != 0;
}

void close_group(int64_t group, int device) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = memberships.find({group, device});
  if (found == memberships.end()) return;
  const CurrentDevice current(device);
  release(found->second);
  memberships.erase(found);
}

}  // namespace flashmla::sm90
