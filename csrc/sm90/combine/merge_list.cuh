// What there is to merge, found from the schedule's cuts by each block of the merge for itself.
#pragma once

#include "../../params.h"
#include "../../split_schedule.h"

namespace flashmla::sm90 {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kFewPieces = 4;  // whose rows a lane can load at once
static_assert(kThreads == kMaxParts, "a thread looks after one part");

// Who merges what: a warp or a block a row, or a half, a quarter or an eighth of one. The more
// pieces, the fewer columns and the more warps, so that a lane has one round of loads to wait for;
// but all blocks should be at work at once, unless a warp could not hold the pieces' weights.
struct Team {
  bool block;
  int split;  // a row into 2^split shares: 0 (by a warp only), 1, 2 or 3

  // rows: of all merges.
  __device__ __forceinline__ Team(int pieces, int rows) {
    const int blocks = gridDim.x;
    // By blocks: more pieces than a warp can weigh; or so few rows that each can have eight blocks,
    // with more than 16 pieces two.
    block = pieces > 32 || (pieces > kFewPieces && rows * (pieces > 16 ? 2 : 8) <= blocks);
    const int teams = blocks * (block ? 1 : kWarps);
    const bool many = pieces > (block ? 64 : 16);  // more than one round of quarters
    split = pieces <= kFewPieces ? 0 : many && 8 * rows <= teams ? 3 : 4 * rows <= teams ? 2 : 1;
  }
};

// What is left to do of a sequence that was cut: it begins in part `owner` and goes on in the next.
struct alignas(16) Merge {
  int owner, pieces, sequence;
  int first_task;  // in the running number of all blocks' tasks
};

// What a block's threads tell one another.
struct SharedList {
  // Bit p: part p goes on with the sequence that part p - 1 went on with.
  uint32_t continues[kMaxParts / 32 + 1];
  int warp_tasks[kWarps];  // of the parts of a warp's threads
  Merge current[2];        // of the block's task, in turns
};

// How many bits from `first` on are set without a gap.
__device__ __forceinline__ int run_length(const uint32_t* bits, int first) {
  int length = 0;
  for (int word = first / 32, shift = first % 32;; ++word, shift = 0) {
    const uint32_t clear = ~bits[word] >> shift << shift;
    if (clear != 0) return length + __ffs(clear) - 1 - shift;
    length += 32 - shift;
  }
}

// Cut `index`; its tile is 0 if that is not within a sequence.
__device__ __forceinline__ Cut load_cut(const DenseDecodeParams& params, int index) {
  const int2 cut = reinterpret_cast<const int2*>(params.cuts)[index];
  return {cut.x, cut.x >= 0 && cut.x < params.b ? max(cut.y, 0) : 0};
}

// The merges to do, as a thread knows them that looks after one part.
struct Merges {
  int rows, tasks;  // of all merges
  Merge mine;       // whose second piece the part begins with
  int mine_end;     // of its tasks; its first task if there is no such merge
};

// Called by every thread, which looks after the part of its number.
__device__ __forceinline__ Merges list_merges(const DenseDecodeParams& params, SharedList& list) {
  const int part = threadIdx.x, lane = part % 32, warp = part / 32;
  const int rows = params.s_q * params.h_q;
  Cut before = {0, 0}, cut = {0, 0};
  if (part > 0 && part < params.num_parts) {
    before = load_cut(params, part - 1);
    cut = load_cut(params, part);
  }
  const bool midway = cut.tile > 0;
  const bool goes_on = midway && before.tile > 0 && before.sequence == cut.sequence;
  const bool starts = midway && !goes_on;
  const uint32_t continues = __ballot_sync(~0u, goes_on);
  if (lane == 0) {
    list.continues[warp] = continues;
    if (warp == 0) list.continues[kWarps] = 0;
  }
  Merges all = {__syncthreads_count(starts) * rows, 0, {part - 1, 0, cut.sequence, 0}, 0};
  if (all.rows == 0) return all;
  int tasks = 0;
  if (starts) {
    all.mine.pieces = 2 + run_length(list.continues, part + 1);
    const Team team(all.mine.pieces, all.rows);
    const int items = rows << team.split;
    tasks = team.block ? items : (items + kWarps - 1) / kWarps;
  }
  int end = tasks;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(~0u, end, i);
    if (lane >= i) end += other;
  }
  if (lane == 31) list.warp_tasks[warp] = end;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const int of_warp = list.warp_tasks[i];
    all.tasks += of_warp;
    if (i < warp) end += of_warp;
  }
  all.mine_end = end;
  all.mine.first_task = end - tasks;
  return all;
}

}  // namespace flashmla::sm90
