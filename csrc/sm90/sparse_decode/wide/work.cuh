// What a thread block has to do: its heads, and its part's pieces.
#pragma once

#include "sm90/sparse_decode/wide/shared_storage.cuh"

namespace flashmla::sm90::sparse::wide {

// A part's pieces in order.
struct PieceWalk {
  int query;  // token of b * s_q
  Piece piece;

  static __device__ __forceinline__ PieceWalk before(Cut begin) { return {begin.sequence - 1, {}}; }

  // Goes to the next piece that is not empty, and calls on_empty(query, piece) for those before it.
  // False where there is none.
  template <typename OnEmpty>
  __device__ __forceinline__ bool next(const sparse::KernelArgs& args, Cut begin, Cut end,
                                       OnEmpty on_empty) {
    for (++query; owns_work(begin, end, query); ++query) {
      piece = piece_of_tiles(begin, end, query, QueryTiles::of(args, query).all);
      if (piece.tile_begin < piece.tile_end) return true;
      on_empty(query, piece);
    }
    return false;
  }
};

}  // namespace flashmla::sm90::sparse::wide
