// How a ragged batch is cut into parts of equal cost. Shared by cpu/ and sm90/ (host and device).
//
// A sequence of n tokens has ceil(n / kSplitTile) tiles. Lay the sequences end to end, each taking
// kSequenceOverhead + tiles units of cost; part p of num_parts owns the units from
// p * total / num_parts up to the next part's first. cuts[p] = (sequence, tile) is the first tile that
// part p owns: a cut that falls into a sequence's overhead is moved to its tile 0, and a cut at the
// end of all is (b, 0). So part p works from cuts[p] up to, not including, cuts[p + 1]:
//
//   sequences   |  0: 5 tiles  | 1 |  2: 7 tiles       |
//   cuts        ^(0,0)    ^(0,4)      ^(2,0)  ^(2,4)    ^(3,0)
//
// A part whose last sequence is not cut by cuts[p + 1] runs to that sequence's end, whatever its
// length then is: a schedule made for other lengths is slower, never wrong.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FLASHMLA_HOST_DEVICE __host__ __device__
#else
#define FLASHMLA_HOST_DEVICE
#endif

namespace flashmla {

constexpr int kSplitTile = 64;        // tokens
constexpr int kSequenceOverhead = 1;  // tiles' worth of time to start and finish a sequence
constexpr int kMaxBatch = 16384;      // sequences that one schedule can hold

struct Cut {
  int32_t sequence;
  int32_t tile;
};

FLASHMLA_HOST_DEVICE constexpr int32_t num_tiles(int32_t seqlen) {
  return seqlen > 0 ? (seqlen - 1) / kSplitTile + 1 : 0;
}

FLASHMLA_HOST_DEVICE constexpr int32_t sequence_cost(int32_t seqlen) {
  return num_tiles(seqlen) + kSequenceOverhead;
}

// The first unit of cost that belongs to `part`.
FLASHMLA_HOST_DEVICE constexpr int64_t part_begin(int part, int num_parts, int64_t total_cost) {
  return total_cost * part / num_parts;
}

// The cut at cost `position`; cost_end[i] is the cost of sequences 0..i together.
FLASHMLA_HOST_DEVICE inline Cut cut_at(int64_t position, const int64_t* cost_end, int b) {
  int low = 0, high = b;  // first sequence whose end is past position
  while (low < high) {
    const int mid = (low + high) / 2;
    if (cost_end[mid] > position) high = mid;
    else low = mid + 1;
  }
  if (low == b) return {b, 0};
  const int64_t begin = low == 0 ? 0 : cost_end[low - 1];
  const int64_t tile = position - begin - kSequenceOverhead;
  return {low, tile > 0 ? static_cast<int32_t>(tile) : 0};
}

// The pieces of work between two cuts. A piece is a run of tiles of one sequence within one part.
struct Piece {
  int32_t tile_begin, tile_end;  // of the sequence; tile_end is clamped to its length
  bool continued;                // begins inside the sequence: slot 2 * part
  bool unfinished;               // ends inside the sequence: slot 2 * part + 1, or 2 * part if continued
};

FLASHMLA_HOST_DEVICE inline bool owns_work(Cut begin, Cut end, int sequence) {
  return sequence >= begin.sequence &&
         (sequence < end.sequence || (sequence == end.sequence && end.tile > 0));
}

FLASHMLA_HOST_DEVICE inline Piece piece_of(Cut begin, Cut end, int sequence, int32_t seqlen) {
  const int32_t tiles = num_tiles(seqlen);
  Piece piece;
  piece.continued = sequence == begin.sequence && begin.tile > 0;
  piece.unfinished = sequence == end.sequence && end.tile > 0;
  piece.tile_begin = piece.continued ? begin.tile : 0;
  piece.tile_end = piece.unfinished && end.tile < tiles ? end.tile : tiles;
  return piece;
}

// Workspace slot of a piece that is continued or unfinished.
FLASHMLA_HOST_DEVICE constexpr int piece_slot(int part, bool continued) {
  return 2 * part + (continued ? 0 : 1);
}

}  // namespace flashmla
