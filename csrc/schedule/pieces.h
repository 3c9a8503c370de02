// What lies between two cuts of a schedule: pieces, the runs of tiles of one sequence within one
// part, and the workspace slots in which unfinished ones are kept. Shared by cpu/ and sm90/ (host
// and device). plan.h says how cuts are chosen.
#pragma once

#include <cstdint>

#include "host_device.h"

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

// tiles: of the sequence.
FLASHMLA_HOST_DEVICE inline Piece piece_of_tiles(Cut begin, Cut end, int sequence, int32_t tiles) {
  Piece piece;
  piece.continued = sequence == begin.sequence && begin.tile > 0;
  piece.unfinished = sequence == end.sequence && end.tile > 0;
  piece.tile_begin = piece.continued ? begin.tile : 0;
  piece.tile_end = piece.unfinished && end.tile < tiles ? end.tile : tiles;
  return piece;
}

FLASHMLA_HOST_DEVICE inline Piece piece_of(Cut begin, Cut end, int sequence, int32_t seqlen) {
  return piece_of_tiles(begin, end, sequence, num_tiles(seqlen));
}

// Workspace slot of a piece that is continued or unfinished.
FLASHMLA_HOST_DEVICE constexpr int piece_slot(int part, bool continued) {
  return 2 * part + (continued ? 0 : 1);
}

// Where a piece's results go: the workspace slot if it is partial, else its sequence.
FLASHMLA_HOST_DEVICE constexpr int result_index(Piece piece, int part, int sequence) {
  return piece.partial() ? piece_slot(part, piece.continued) : sequence;
}

}  // namespace flashmla
