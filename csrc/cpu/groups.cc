#include "cpu/groups.h"

#include <map>
#include <utility>

namespace flashmla::cpu {
namespace {

struct Membership {
  Member member;
  std::shared_ptr<Rendezvous> rendezvous;
};

std::mutex mutex;
std::map<std::pair<int64_t, int>, Membership> memberships;  // by group and device

// False where the device is not a member of the group.
bool find_membership(int64_t group, int device, Membership* membership) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = memberships.find({group, device});
  if (found == memberships.end()) return false;
  *membership = found->second;
  return true;
}

}  // namespace

Status meet_group(const char* operation, int64_t group, int device, const Shown& mine,
                  const std::function<void(const Member&, const Shown*)>& work) {
  Membership membership;
  if (!find_membership(group, device, &membership)) {
    return Status::FailedPrecondition(
        std::string(operation) + ": device " + std::to_string(device) +
        " is not connected to the others of its group: call connect_peers with the mesh that "
        "shard_map is given");
  }
  const Member& member = membership.member;
  Rendezvous& rendezvous = *membership.rendezvous;
  rendezvous.shown[member.rank] = mine;
  bool together = rendezvous.meet();
  bool alike = true;
  for (int rank = 0; together && rank < member.size; ++rank) {
    const Shown& other = rendezvous.shown[rank];
    alike &= other.call == mine.call && other.sizes == mine.sizes;
  }
  if (together && alike) work(member, rendezvous.shown.data());
  together = together && rendezvous.meet();
  if (!together) {
    return Status::Internal(std::string(operation) +
                            ": a device of the group did not take part in this call or an earlier "
                            "one within the timeout of connect_peers");
  }
  if (alike) return Status::Ok();
  return Status::Internal(std::string(operation) +
                          ": the devices of the group make different calls");
}

Status open_group(const Member& member, std::string* handle) {
  std::lock_guard<std::mutex> lock(mutex);
  handle->clear();
  if (member.size < 2 || member.size > kMaxPeers || member.rank < 0 || member.rank >= member.size) {
    return Status::InvalidArgument("a group must have between 2 and 8 members, got rank " +
                                   std::to_string(member.rank) + " of " +
                                   std::to_string(member.size));
  }
  std::shared_ptr<Rendezvous> rendezvous;
  for (const auto& [key, other] : memberships) {
    const bool same = key.first == member.group && other.member.subgroup == member.subgroup;
    if (same) rendezvous = other.rendezvous;
  }
  if (!rendezvous) rendezvous = std::make_shared<Rendezvous>(member.size, member.timeout_ns);
  const bool is_new =
      memberships.try_emplace({member.group, member.device}, Membership{member, rendezvous}).second;
  return is_new ? Status::Ok() : Status::FailedPrecondition("the group is open already");
}

Status reach_member(int64_t group, int device, int peer_rank, int peer_device, const std::string&) {
  Membership membership;
  if (peer_device < 0) {
    return Status::FailedPrecondition("CPU devices of other processes cannot be reached");
  }
  if (!find_membership(group, device, &membership) ||
      !find_membership(group, peer_device, &membership)) {
    return Status::FailedPrecondition("the group is not open");
  }
  if (membership.member.rank == peer_rank) return Status::Ok();
  return Status::InvalidArgument("rank " + std::to_string(peer_rank) + " is no other member's");
}

bool has_failed(int64_t group, int device) {
  Membership membership;
  return find_membership(group, device, &membership) && membership.rendezvous->failed();
}

void close_group(int64_t group, int device) {
  std::lock_guard<std::mutex> lock(mutex);
  memberships.erase({group, device});
}

}  // namespace flashmla::cpu
