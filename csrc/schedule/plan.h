// How a ragged batch is cut into parts. Shared by cpu/ and sm90/ (host and device).
//
// A sequence of n tokens has ceil(n / kSplitTile) tiles. cuts[p] = (sequence, tile) is the first
// tile of part p, which works up to, not including, cuts[p + 1]; (b, 0) is the end of all:
//
//   sequences   |  0: 5 tiles  | 1 |  2: 7 tiles       |
//   cuts        ^(0,0)    ^(0,4)      ^(2,0)  ^(2,4)    ^(3,0)
//
// Three plans, of which the best is taken. Uniform: every sequence in pieces of `stride` tiles (the
// last may be shorter), one piece a part; best where there are fewer sequences than parts. Packed:
// the sequences end to end, each taking kSequenceOverhead + tiles units of cost, cut every `stride`
// units; a cut that falls into a sequence's overhead is moved to its tile 0. Whole: as packed, but
// each cut is moved to the nearest sequence's beginning, so that there is nothing to merge.
//
// A part whose last sequence is not cut by cuts[p + 1] runs to that sequence's end, whatever its
// length then is: a schedule made for other lengths is slower, never wrong.
#pragma once

#include <cstdint>

#include "schedule/pieces.h"

namespace flashmla {

constexpr int kSequenceOverhead = 2;  // tiles' worth of time to start and finish a piece
constexpr int kCutCost =
    8;  // tiles' worth of time that parts may differ by to spare cuts and merges
constexpr int kMaxBatch = 16384;  // sequences that one schedule can hold
constexpr int kMaxParts = 256;

FLASHMLA_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many pieces of at most `stride` tiles a sequence makes; an empty one still makes one.
FLASHMLA_HOST_DEVICE constexpr int64_t num_pieces(int64_t tiles, int64_t stride) {
  return tiles > stride ? ceil_div(tiles, stride) : 1;
}

struct SplitPlan {
  enum Kind { kUniform, kPacked, kWhole } kind;
  int64_t stride;  // tiles of a piece, or units of cost between two cuts
};

// uniform_stride: the least stride whose pieces are at most num_parts, or 0 where b > num_parts. A
// packed plan is still to be compared with the whole one.
FLASHMLA_HOST_DEVICE constexpr SplitPlan choose_plan(int b, int num_parts, int64_t total_tiles,
                                                     int64_t uniform_stride) {
  // The first sequence's overhead is not counted: then each part pays for starting, and for its
  // tiles.
  const int64_t cost = total_tiles + int64_t{kSequenceOverhead} * (b - 1);
  const int64_t packed_stride = cost > 0 ? ceil_div(cost, num_parts) : 1;
  // A part of the packed plan often starts two sequences, one of the uniform plan only one.
  if (uniform_stride > 0 && uniform_stride <= packed_stride + kSequenceOverhead) {
    return {SplitPlan::kUniform, uniform_stride};
  }
  return {SplitPlan::kPacked, packed_stride};
}

// Units that a sequence takes: pieces in the uniform plan, cost in the packed one.
FLASHMLA_HOST_DEVICE constexpr int64_t sequence_units(SplitPlan plan, int64_t tiles) {
  return plan.kind == SplitPlan::kUniform ? num_pieces(tiles, plan.stride)
                                          : tiles + kSequenceOverhead;
}

// In what follows unit_end[i] is the units of sequences 0..i together.

FLASHMLA_HOST_DEVICE constexpr int64_t units_before(int sequence, const int64_t* unit_end) {
  return sequence > 0 ? unit_end[sequence - 1] : 0;
}

// The first sequence whose end is past a position; b where there is none.
FLASHMLA_HOST_DEVICE inline int find_sequence(int64_t position, const int64_t* unit_end, int b) {
  int low = 0, high = b;
  while (low < high) {
    const int mid = (low + high) / 2;
    if (unit_end[mid] > position)
      high = mid;
    else
      low = mid + 1;
  }
  return low;
}

// The sequence that part `part` of the whole plan begins with.
FLASHMLA_HOST_DEVICE inline int whole_cut(int part, int num_parts, const int64_t* unit_end, int b) {
  const int64_t total = units_before(b, unit_end);
  const int64_t position = part * (total / num_parts) + part * (total % num_parts) / num_parts;
  const int sequence = find_sequence(position, unit_end, b);
  if (sequence == b) return b;
  const int64_t before = position - units_before(sequence, unit_end);
  return before < unit_end[sequence] - position ? sequence : sequence + 1;
}

// Units of part `part` of the whole plan.
FLASHMLA_HOST_DEVICE inline int64_t whole_part_units(int part, int num_parts,
                                                     const int64_t* unit_end, int b) {
  return units_before(whole_cut(part + 1, num_parts, unit_end, b), unit_end) -
         units_before(whole_cut(part, num_parts, unit_end, b), unit_end);
}

// The whole plan instead of a packed one, if its largest part is not too large.
FLASHMLA_HOST_DEVICE constexpr SplitPlan choose_whole(SplitPlan packed, int64_t largest_units) {
  if (largest_units > packed.stride + kCutCost) return packed;
  return {SplitPlan::kWhole, packed.stride};
}

// Cut number `part`.
FLASHMLA_HOST_DEVICE inline Cut cut_at(SplitPlan plan, int part, int num_parts,
                                       const int64_t* unit_end, int b) {
  if (plan.kind == SplitPlan::kWhole) return {whole_cut(part, num_parts, unit_end, b), 0};
  const bool uniform = plan.kind == SplitPlan::kUniform;
  int64_t position = part;
  if (!uniform && part > 0) position = kSequenceOverhead + part * plan.stride;
  const int sequence = find_sequence(position, unit_end, b);
  if (sequence == b) return {b, 0};
  const int64_t offset = position - units_before(sequence, unit_end);
  const int64_t tile = uniform ? offset * plan.stride : offset - kSequenceOverhead;
  return {sequence, tile > 0 ? static_cast<int32_t>(tile) : 0};
}

}  // namespace flashmla
