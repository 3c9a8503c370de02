// What make_schedule is given.
#pragma once

#include <cstdint>

namespace flashmla {

// Splits the batch's tokens over num_parts workers; see schedule/plan.h for what a cut means.
struct MakeScheduleParams {
  int b;
  int num_parts;
  const int32_t* cache_seqlens;  // [b] tokens; negative counts as 0
  int32_t* cuts;                 // [num_parts + 1, 2] (sequence, tile)
};

}  // namespace flashmla
