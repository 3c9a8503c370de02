#include "cpu/make_schedule.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "schedule/plan.h"

namespace flashmla::cpu {

namespace {

// The least stride that cuts the sequences into at most num_parts pieces.
int64_t find_uniform_stride(const std::vector<int64_t>& tiles, int num_parts) {
  const int64_t total = std::accumulate(tiles.begin(), tiles.end(), int64_t{0});
  int64_t high = std::max<int64_t>(1, *std::max_element(tiles.begin(), tiles.end()));
  int64_t low = std::max(ceil_div(total, num_parts), int64_t{1});
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    int64_t pieces = 0;
    for (const int64_t t : tiles) pieces += num_pieces(t, mid);
    if (pieces <= num_parts)
      high = mid;
    else
      low = mid + 1;
  }
  return low;
}

}  // namespace

// A few microseconds even for the largest batch: not worth a thread.
Status run_make_schedule(const MakeScheduleParams& params, const ParallelFor&) {
  std::vector<int64_t> tiles(params.b);
  for (int i = 0; i < params.b; ++i) tiles[i] = num_tiles(params.cache_seqlens[i]);
  const int64_t total = std::accumulate(tiles.begin(), tiles.end(), int64_t{0});
  const bool few = params.b <= params.num_parts;
  const int64_t uniform_stride = few ? find_uniform_stride(tiles, params.num_parts) : 0;
  SplitPlan plan = choose_plan(params.b, params.num_parts, total, uniform_stride);

  std::vector<int64_t> unit_end(params.b);
  int64_t units = 0;
  for (int i = 0; i < params.b; ++i) unit_end[i] = units += sequence_units(plan, tiles[i]);
  if (plan.kind == SplitPlan::kPacked) {
    int64_t largest = 0;
    for (int part = 0; part < params.num_parts; ++part) {
      largest =
          std::max(largest, whole_part_units(part, params.num_parts, unit_end.data(), params.b));
    }
    plan = choose_whole(plan, largest);
  }
  for (int part = 0; part <= params.num_parts; ++part) {
    // The last cut is the end also where rounding left room behind it.
    const Cut cut = part < params.num_parts
                        ? cut_at(plan, part, params.num_parts, unit_end.data(), params.b)
                        : Cut{params.b, 0};
    params.cuts[2 * part] = cut.sequence;
    params.cuts[2 * part + 1] = cut.tile;
  }
  return Status::Ok();
}

}  // namespace flashmla::cpu
