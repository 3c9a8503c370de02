// What a thread block has to do: its heads, and its part's pieces.
#pragma once

#include "sm90/sparse_decode/wide/shared_storage.cuh"

namespace flashmla::sm90::sparse::wide {

// A part's pieces in order.
struct PieceWalk {
  int query;   // token of b * s_q
  int tiles;   // of the piece
  int target;  // where its results go: the query token, or ~(workspace slot)

  static __device__ __forceinline__ PieceWalk before(Cut begin) {
    return {begin.sequence - 1, 0, 0};
  }

  // Goes to the next piece that is not empty, and calls on_empty(walk) for those before it.
  template <typename OnEmpty>
  __device__ __forceinline__ void next(const sparse::KernelArgs& args, Cut begin, Cut end,
                                       OnEmpty on_empty) {
    for (++query; owns_work(begin, end, query); ++query) {
      const Piece piece = piece_of_tiles(begin, end, query, QueryTiles::of(args, query).all);
      tiles = piece.tile_end - piece.tile_begin;
      const int index = result_index(piece, blockIdx.y, query);
      target = piece.partial() ? ~index : index;
      if (tiles > 0) return;
      on_empty(*this);
    }
    query = INT32_MAX;
  }

  __device__ __forceinline__ bool done() const { return query == INT32_MAX; }
  __device__ __forceinline__ bool partial() const { return target < 0; }

  // Of the h_q rows, in the result or the workspace.
  __device__ __forceinline__ int64_t first_row(int h_q) const {
    return int64_t{partial() ? ~target : target} * h_q;
  }
};

}  // namespace flashmla::sm90::sparse::wide
