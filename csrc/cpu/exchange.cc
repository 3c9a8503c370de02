#include "cpu/exchange.h"

#include <cstring>

#include "cpu/groups.h"

namespace flashmla::cpu {

Status run_exchange(const ExchangeParams& params, const ParallelFor&) {
  const Exchanged* arrays = params.arrays;
  constexpr int kCall = 16;  // behind the element types, which are all_reduce_sum's
  const Shown mine = {kCall + params.size + (params.gather ? kMaxPeers : 0),
                      {arrays[0].bytes, arrays[1].bytes},
                      {arrays[0].x, arrays[1].x}};
  bool fits = true;
  const Status status = meet_group(
      "exchange", params.group, params.device, mine, [&](const Member& member, const Shown* shown) {
        fits = params.size == member.size;
        for (int rank = 0; fits && rank < member.size; ++rank) {
          for (int i = 0; i < params.count; ++i) {
            const int64_t bytes = arrays[i].bytes;
            std::memcpy(static_cast<char*>(arrays[i].out) + rank * bytes,
                        static_cast<const char*>(shown[rank].x[i]) +
                            (params.gather ? 0 : member.rank) * bytes,
                        bytes);
          }
        }
      });
  if (!status.ok() || fits) return status;
  return Status::InvalidArgument("exchange: out must have a segment of each device, got " +
                                 std::to_string(params.size));
}

}  // namespace flashmla::cpu
