#include "cpu/all_reduce_sum.h"

#include <array>
#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "elements.h"

namespace flashmla::cpu {
namespace {

// Where the threads of a group meet: once to show their x, once more before any of them goes away
// with it.
class Rendezvous {
 public:
  Rendezvous(int size, int64_t timeout_ns) : size_(size), timeout_(timeout_ns) {}

  // False where a member did not come in time, then and ever after.
  bool meet() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (failed_) return false;
    const int64_t round = round_;
    if (++present_ == size_) {
      present_ = 0;
      ++round_;
      all_present_.notify_all();
      return true;
    }
    const auto over = [&] { return round_ != round || failed_; };
    if (!all_present_.wait_for(lock, timeout_, over)) {
      failed_ = true;
      all_present_.notify_all();
    }
    return round_ != round;
  }

  bool failed() {
    std::lock_guard<std::mutex> lock(mutex_);
    return failed_;
  }

  std::array<AllReduceSumParams, kMaxPeers> shown = {};  // by rank; of the meeting's own members

 private:
  const int size_;
  const std::chrono::nanoseconds timeout_;
  std::mutex mutex_;
  std::condition_variable all_present_;
  int present_ = 0;
  int64_t round_ = 0;
  bool failed_ = false;
};

struct Membership {
  Member member;
  std::shared_ptr<Rendezvous> rendezvous;
};

std::mutex mutex;
std::map<std::pair<int64_t, int>, Membership> memberships;  // by group and device

bool find_membership(int64_t group, int device, Membership* membership) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = memberships.find({group, device});
  if (found == memberships.end()) return false;
  *membership = found->second;
  return true;
}

template <class Element>
void sum_ranks(const Rendezvous& rendezvous, int size, const AllReduceSumParams& params) {
  auto* out = static_cast<Element*>(params.out);
  for (int64_t i = 0; i < params.elements; ++i) {
    float sum = 0;
    for (int rank = 0; rank < size; ++rank) {
      sum += Element::to_float(static_cast<const Element*>(rendezvous.shown[rank].x)[i]);
    }
    out[i] = Element::from_float(sum);
  }
}

}  // namespace

Status run_all_reduce_sum(const AllReduceSumParams& params, const ParallelFor&) {
  Membership membership;
  if (!find_membership(params.group, params.device, &membership)) {
    return Status::FailedPrecondition(
        "all_reduce_sum: device " + std::to_string(params.device) +
        " is not connected to the others of its group: call connect_peers with the mesh that "
        "shard_map is given");
  }
  const Member& member = membership.member;
  Rendezvous& rendezvous = *membership.rendezvous;
  rendezvous.shown[member.rank] = params;
  bool together = rendezvous.meet();
  bool alike = true;
  for (int rank = 0; together && rank < member.size; ++rank) {
    const AllReduceSumParams& other = rendezvous.shown[rank];
    alike &= other.elements == params.elements && other.dtype == params.dtype;
  }
  if (together && alike) {
    with_element(params.dtype, [&](auto element) {
      sum_ranks<decltype(element)>(rendezvous, member.size, params);
    });
  }
  together = together && rendezvous.meet();
  if (!together) {
    return Status::Internal(
        "all_reduce_sum: a device of the group did not take part in this sum or an earlier one "
        "within the timeout of connect_peers");
  }
  if (alike) return Status::Ok();
  return Status::Internal("all_reduce_sum: the devices of the group make different calls");
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
