#include "cpu/all_reduce_sum.h"

#include "cpu/groups.h"
#include "elements.h"

namespace flashmla::cpu {
namespace {

template <class Element>
void sum_ranks(const Shown* shown, int size, const AllReduceSumParams& params) {
  auto* out = static_cast<Element*>(params.out);
  for (int64_t i = 0; i < params.elements; ++i) {
    float sum = 0;
    for (int rank = 0; rank < size; ++rank) {
      sum += Element::to_float(static_cast<const Element*>(shown[rank].x[0])[i]);
    }
    out[i] = Element::from_float(sum);
  }
}

}  // namespace

Status run_all_reduce_sum(const AllReduceSumParams& params, const ParallelFor&) {
  const Shown mine = {static_cast<int>(params.dtype), {params.elements, 0}, {params.x}};
  return meet_group("all_reduce_sum", params.group, params.device, mine,
                    [&](const Member& member, const Shown* shown) {
                      with_element(params.dtype, [&](auto element) {
                        sum_ranks<decltype(element)>(shown, member.size, params);
                      });
                    });
}

}  // namespace flashmla::cpu
