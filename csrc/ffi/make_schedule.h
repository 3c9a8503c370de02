// make_schedule: its operands and results, and their way into MakeScheduleParams.
#pragma once

#include <utility>

#include "ffi/buffers.h"
#include "params/make_schedule.h"
#include "schedule/plan.h"
#include "status.h"

namespace flashmla::ffi {

template <typename Binding>
auto bind_make_schedule(Binding context) {
  return std::move(context)
      .template Arg<I32R1>()   // cache_seqlens
      .template Ret<I32R2>();  // cuts
}

inline Status read_make_schedule(I32R1 cache_seqlens, Result<I32R2> cuts,
                                 MakeScheduleParams* params) {
  ExtentChecks checks;
  const auto [b] = checks.read<1>("cache_seqlens", cache_seqlens.dimensions(), {"b"});
  if (b > kMaxBatch) {
    checks.fail("b must be at most " + std::to_string(kMaxBatch) + ", got " + std::to_string(b));
  }
  params->b = checks.int32("b", b);
  params->num_parts = checks.int32("num_parts", read_num_parts(checks, cuts->dimensions()));
  params->cache_seqlens = cache_seqlens.typed_data();
  params->cuts = cuts->typed_data();
  return checks.status();
}

}  // namespace flashmla::ffi

FLASHMLA_OPERATION(make_schedule, MakeScheduleParams)
