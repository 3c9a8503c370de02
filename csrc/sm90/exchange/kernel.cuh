// Segments sent from every device of a group to every other, in one round over the mailboxes of
// connect_peers: round 1 of all_reduce_sum/kernel.cuh, without sums.
//
// Every block sends to, and awaits, its counterpart on every other device, so what is said there of
// slots that are filled again holds here, also where the two kernels' calls follow each other.
#pragma once

#include "params/exchange.h"
#include "sm90/exchange/config.h"
#include "sm90/peers/receive.cuh"

namespace flashmla::sm90::exchange {

// kSize: at least the group's size.
template <int kSize>
__global__ void __launch_bounds__(kThreads, 1)
    exchange_kernel(const __grid_constant__ ExchangeParams params,
                    const __grid_constant__ Workspace workspace,
                    const __grid_constant__ Split split) {
  const int size = workspace.size, rank = workspace.rank;
  const int64_t first = blockIdx.x * split.chunk;
  const int64_t count = min(split.chunk, split.vectors - first);

  const Turn turn = begin_turn(workspace, split.chunk);
  const Region& region = turn.region;

  // Number `vector` of a segment: its array, and its place in that array's segments.
  const int64_t of_first = params.arrays[0].bytes / kVectorBytes;
  const auto find = [&](int segment, int64_t vector, const Exchanged*& array) {
    const bool second = vector >= of_first;
    array = &params.arrays[second];
    return segment * (array->bytes / kVectorBytes) + vector - (second ? of_first : 0);
  };
  const auto load = [&](int to, int64_t i) {
    const Exchanged* array;
    const int64_t at = find(params.gather ? 0 : to, first + i, array);
    return turn.failed ? kNaNs : static_cast<const uint4*>(array->x)[at];
  };
  const auto store = [&](int from, int64_t i, const uint4& v) {
    const Exchanged* array;
    const int64_t at = find(from, first + i, array);
    static_cast<uint4*>(array->out)[at] = v;
  };

  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const uint4 own = load(rank, i);
#pragma unroll
    for (int step = 1; step < kSize; ++step) {
      if (step >= size) break;
      const int to = other(workspace, step);
      send(region.slot(to, 0, rank, i), params.gather ? own : load(to, i));
    }
    store(rank, i, own);
  }
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    uint4 parts[kSize];
    look<kSize>(region, 0, i, parts);
#pragma unroll
    for (int from = 0; from < kSize; ++from) {
      if (from < size && from != rank) store(from, i, take(region, 0, from, i, parts[from]));
    }
  }
  end_turn(turn);
}

}  // namespace flashmla::sm90::exchange
