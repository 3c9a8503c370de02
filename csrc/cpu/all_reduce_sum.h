#pragma once

#include <cstdint>
#include <string>

#include "cpu/parallel_for.h"
#include "params/all_reduce_sum.h"
#include "status.h"

namespace flashmla::cpu {

// Sums x over the CPU devices of a group, which are threads of one process.
Status run_all_reduce_sum(const AllReduceSumParams& params, const ParallelFor& parallel_for);

// As in sm90/all_reduce_sum/workspace.h. No other process can be reached.
Status open_group(const Member& member, std::string* handle);
Status reach_member(int64_t group, int device, int peer_rank, int peer_device,
                    const std::string& handle);
bool has_failed(int64_t group, int device);
void close_group(int64_t group, int device);

}  // namespace flashmla::cpu
