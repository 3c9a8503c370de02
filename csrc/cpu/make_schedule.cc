#include "cpu/make_schedule.h"

#include <cstdint>
#include <vector>

#include "split_schedule.h"

namespace flashmla::cpu {

// A few microseconds even for the largest batch: not worth a thread.
Status run_make_schedule(const MakeScheduleParams& params, const ParallelFor&) {
  std::vector<int64_t> cost_end(params.b);
  int64_t total = 0;
  for (int i = 0; i < params.b; ++i) {
    total += sequence_cost(params.cache_seqlens[i]);
    cost_end[i] = total;
  }
  for (int part = 0; part <= params.num_parts; ++part) {
    const int64_t begin = part_begin(part, params.num_parts, total);
    const Cut cut = cut_at(begin, cost_end.data(), params.b);
    params.cuts[2 * part] = cut.sequence;
    params.cuts[2 * part + 1] = cut.tile;
  }
  return Status::Ok();
}

}  // namespace flashmla::cpu
