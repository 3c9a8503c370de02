// Which merge a block takes part in, found from the schedule's cuts.
//
// A block looks after one part, and so do the others with its blockIdx.y. A sequence that was cut
// is merged by the blocks of the parts that have a piece of it: many pieces, many blocks.
#pragma once

#include "params/merge.h"
#include "schedule/plan.h"

namespace flashmla::sm90::merge {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kFewPieces = 4;    // a lane can load its share of all of them at once
constexpr int kWarpPieces = 64;  // a warp can weigh
static_assert(kThreads == kMaxParts, "a thread looks at one part");

// A sequence that was cut: it begins in part `owner` and goes on in the next ones.
struct Merge {
  int owner, pieces, sequence;
  int block_rank, blocks;  // this block's rank among those that merge the sequence
};

// Cut `index`; its tile is 0 unless it is within a sequence.
__device__ __forceinline__ Cut load_task_cut(const MergeParams& params, int index) {
  const int2 cut = reinterpret_cast<const int2*>(params.cuts)[index];
  return {cut.x, cut.x >= 0 && cut.x < params.b ? max(cut.y, 0) : 0};
}

// Finds this block's merge; called by every thread of a block. Returns pieces == 1 when there is
// nothing to merge. A part that goes on with one sequence and begins another has its blocks merge
// the first.
__device__ __forceinline__ Merge find_merge(const MergeParams& params) {
  const int part = blockIdx.y, other = threadIdx.x;
  const Cut begin = load_task_cut(params, part), end = load_task_cut(params, part + 1);
  Cut other_begin = {0, 0}, other_end = {0, 0};
  if (other < params.num_parts) {
    other_begin = load_task_cut(params, other);
    other_end = load_task_cut(params, other + 1);
  }
  const int sequence = begin.tile > 0 ? begin.sequence : end.tile > 0 ? end.sequence : -1;
  const bool goes_on = other_begin.tile > 0 && other_begin.sequence == sequence;
  const bool starts = other_begin.tile == 0 && other_end.tile > 0 && other_end.sequence == sequence;
  const int continued = __syncthreads_count(goes_on);
  const int before = __syncthreads_count(goes_on && other <= part);
  const int started = __syncthreads_count(starts);  // 0 or 1
  const int blocks = gridDim.x;                     // of one part
  return {part - before, continued + 1, sequence, (before + started - 1) * blocks + int(blockIdx.x),
          (continued + started) * blocks};
}

// Who merges what: a warp or a block takes a row, or a half, a quarter or an eighth of one. The
// more pieces, the fewer columns and the more warps, so that a lane has one round of loads to wait
// for; but all should be at work at once, unless a warp could not hold the pieces' weights.
struct Team {
  bool block;
  int split;  // a row into 2^split shares: 0 (by a warp only), 1, 2 or 3

  // pieces, rows, blocks: of one merge.
  __device__ __forceinline__ Team(int pieces, int rows, int blocks) {
    // A block takes more pieces than a warp can weigh; or so few rows that each can have eight
    // blocks, with more than 16 pieces two.
    block = pieces > kWarpPieces || (pieces > kFewPieces && rows * (pieces > 16 ? 2 : 8) <= blocks);
    const int teams = blocks * (block ? 1 : kWarps);
    const bool many = pieces > (block ? 64 : 16);  // more than one round of quarters
    split = pieces <= kFewPieces ? 0 : many && 8 * rows <= teams ? 3 : 4 * rows <= teams ? 2 : 1;
  }
};

}  // namespace flashmla::sm90::merge
