// x summed over the devices of a group, in one round or two.
//
// One round: every device puts its x into every mailbox, and sums what arrives in its own. Two
// rounds: device s sums segment s, whose sums then travel to all. Sums are made in float32 in the
// order of ranks, so that all devices have the same bits.
//
// A thread sends, awaits and empties the same vectors of every member. So threads wait for the
// same thread of other devices, never for their own block or grid, and blocks need not run at once.
//
// Why a slot is empty when it is filled again. Slots of even and odd epochs differ. A block at
// epoch e + 2 sends into slots that its counterpart emptied in epoch e: this one's kernel had ended
// before it sent the words of epoch e + 1, all of which were awaited before epoch e + 2. A block's
// epoch is its own count in device memory, so a replayed graph goes on counting, and grids of other
// sizes in between do not matter.
//
// Hazard: the calls of a device on one group must be ordered by its stream, those of exchange too.
// No launch of their kernels may start before the previous one has ended (programmatic dependent
// launch).
#pragma once

#include "params/all_reduce_sum.h"
#include "sm90/all_reduce_sum/config.h"
#include "sm90/all_reduce_sum/vector.cuh"
#include "sm90/peers/receive.cuh"

namespace flashmla::sm90::all_reduce_sum {

// kSize: at least the group's size.
template <class Element, int kSize, bool kTwoRounds>
__global__ void __launch_bounds__(kThreads, 1)
    all_reduce_sum_kernel(const __grid_constant__ AllReduceSumParams params,
                          const __grid_constant__ Workspace workspace,
                          const __grid_constant__ Split split) {
  const auto* x = static_cast<const Element*>(params.x);
  auto* out = static_cast<Element*>(params.out);
  const int size = workspace.size, rank = workspace.rank;
  const int64_t vectors = (params.elements + kElements<Element> - 1) / kElements<Element>;
  const int64_t first = blockIdx.x * split.chunk;
  const int64_t count = min(split.chunk, split.segment - first);

  const Turn turn = begin_turn(workspace, split.chunk);
  const Region& region = turn.region;

  const auto load = [&](int64_t vector) {
    return turn.failed ? kNaNs : reinterpret_cast<const uint4*>(x)[vector];
  };
  const auto store = [&](int64_t vector, const uint4& v) {
    store_vector(out, vector * kElements<Element>, params.elements, v);
  };
  // The vector of x that is number i of this block in the segment of `owner`.
  const auto vector_of = [&](int owner, int64_t i) {
    return (kTwoRounds ? owner * split.segment : 0) + first + i;
  };

  // Round 1: x to those that sum it.
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const uint4 whole = kTwoRounds ? kNaNs : load(first + i);
#pragma unroll
    for (int step = 1; step < kSize; ++step) {
      if (step >= size) break;
      const int to = other(workspace, step);
      const int64_t vector = vector_of(to, i);
      if (vector < vectors) send(region.slot(to, 0, rank, i), kTwoRounds ? load(vector) : whole);
    }
  }
  // The sums: to out, and in round 2 to the others.
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const int64_t vector = vector_of(rank, i);
    if (vector >= vectors) break;
    uint4 parts[kSize];
    look<kSize>(region, 0, i, parts);
    const uint4 own = load(vector);
    Sums<Element> sums;
#pragma unroll
    for (int from = 0; from < kSize; ++from) {
      if (from >= size) break;
      sums.add(from == rank ? own : take(region, 0, from, i, parts[from]));
    }
    const uint4 total = sums.rounded();
    store(vector, total);
    if constexpr (kTwoRounds) {
#pragma unroll
      for (int step = 1; step < kSize; ++step) {
        if (step < size) send(region.slot(other(workspace, step), 1, rank, i), total);
      }
    }
  }
  // Round 2: the others' sums.
  if constexpr (kTwoRounds) {
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      uint4 parts[kSize];
      look<kSize>(region, 1, i, parts);
#pragma unroll
      for (int from = 0; from < kSize; ++from) {
        const int64_t vector = vector_of(from, i);
        if (from < size && from != rank && vector < vectors) {
          store(vector, take(region, 1, from, i, parts[from]));
        }
      }
    }
  }
  end_turn(turn);
}

}  // namespace flashmla::sm90::all_reduce_sum
