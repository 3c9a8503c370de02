#include "cpu/all_reduce_sum.h"

#include "cpu/groups.h"
#include "elements.h"

namespace flashmla::cpu {
namespace {

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

}  // namespace flashmla::cpu
