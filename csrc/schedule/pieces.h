// What lies between two cuts of a schedule: pieces, the runs of tiles of one sequence within one
// part, and the workspace slots in which unfinished ones are kept. Shared by cpu/ and sm90/ (host
// and device). plan.h says how cuts are chosen.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FLASHMLA_HOST_DEVICE __host__ __device__
#else
#define FLASHMLA_HOST_DEVICE
#endif

namespace flashmla {

constexpr int kSplitTile = 64;  // tokens

struct Cut {
  int32_t sequence;
  int32_t tile;
};

FLASHMLA_HOST_DEVICE constexpr int32_t num_tiles(int32_t seqlen) {
  return seqlen > 0 ? (seqlen - 1) / kSplitTile + 1 : 0;
}

struct Piece {
  int32_t tile_begin, tile_end;  // of the sequence; tile_end is clamped to its length
  bool continued;                // begins inside the sequence: slot 2 * part
  bool unfinished;  // ends inside the sequence: slot 2 * part + 1, or 2 * part if continued

  FLASHMLA_HOST_DEVICE constexpr bool partial() const { return continued || unfinished; }
};

FLASHMLA_HOST_DEVICE inline bool owns_work(Cut begin, Cut end, int sequence) {
  return sequence >= begin.sequence &&
         (sequence < end.sequence || (sequence == end.sequence && end.tile > 0));
}

// Whether a part's piece of a sequence begins or ends inside it. AnyCut: Cut, volatile or not.
template <typename AnyCut>
FLASHMLA_HOST_DEVICE constexpr bool is_continued(const AnyCut& begin, int sequence) {
  return sequence == begin.sequence && begin.tile > 0;
}

template <typename AnyCut>
FLASHMLA_HOST_DEVICE constexpr bool is_unfinished(const AnyCut& end, int sequence) {
  return sequence == end.sequence && end.tile > 0;
}

FLASHMLA_HOST_DEVICE inline Piece piece_of(Cut begin, Cut end, int sequence, int32_t seqlen) {
  const int32_t tiles = num_tiles(seqlen);
  Piece piece;
  piece.continued = is_continued(begin, sequence);
  piece.unfinished = is_unfinished(end, sequence);
  piece.tile_begin = piece.continued ? begin.tile : 0;
  piece.tile_end = piece.unfinished && end.tile < tiles ? end.tile : tiles;
  return piece;
}

// Workspace slot of a piece that is continued or unfinished.
FLASHMLA_HOST_DEVICE constexpr int piece_slot(int part, bool continued) {
  return 2 * part + (continued ? 0 : 1);
}

}  // namespace flashmla
