// The pieces of a row in the workspace: where they are, and how they are loaded.
//
// A merge is short, and what it executes, it executes once: much of its time goes into fetching
// instructions. So all that can be computed before it waits for the results is.
#pragma once

#include "params/merge.h"
#include "schedule/pieces.h"
#include "sm90/attention/partial.cuh"
#include "sm90/ptx/barrier.cuh"

namespace flashmla::sm90::merge {

// Waits for the kernel whose results are merged, once.
struct Prerequisites {
  bool awaited = false;

  __device__ __forceinline__ void await() {
    if (awaited) return;
    wait_for_prerequisites();
    launch_dependents();
    awaited = true;
  }
};

// Keeps the compiler from computing an address where it is used, past the wait.
template <typename V>
__device__ __forceinline__ void pin_address(V*& address) {
  asm volatile("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
}

// A row to merge: where its pieces are in the workspace. Piece 0 is the owner's, the others are the
// next parts'.
template <int kColumns>
struct RowPieces {
  const float *columns, *lse;  // of the owner's first slot
  int count;
  uint32_t slot_rows;  // rows of a slot

  __device__ __forceinline__ RowPieces(const MergeParams& params, int owner, int pieces, int row)
      : count(pieces), slot_rows(params.rows) {
    const int64_t first = int64_t{piece_slot(owner, /*continued=*/true)} * slot_rows + row;
    columns = params.out_accum + first * kColumns;
    lse = params.lse_accum + first;
  }

  // Rows from the owner's first slot to a piece's.
  __device__ __forceinline__ uint32_t offset(int piece) const {
    return piece_slot(piece, /*continued=*/piece > 0) * slot_rows;
  }

  __device__ __forceinline__ const float* row(int piece) const {
    return columns + uint64_t{offset(piece)} * kColumns;
  }
};

// 16 bytes, number `column` of a row, of every `turns`-th piece from `piece` on.
struct PieceLoads {
  const float* next;
  int64_t first_step, step;  // floats; the owner's piece is not in its part's first slot
  int left, turns;

  template <int kColumns>
  __device__ __forceinline__ PieceLoads(const RowPieces<kColumns>& pieces, int piece, int turns,
                                        int column)
      : next(pieces.row(piece) + column * 4),
        step(int64_t{pieces.offset(turns)} * kColumns),
        left(pieces.count - piece),
        turns(turns) {
    first_step = step - (piece == 0 ? int64_t{pieces.slot_rows} * kColumns : 0);
    pin_address(next);
  }

  // Loads the next kCount; zeros past the last piece.
  template <int kCount>
  __device__ __forceinline__ void load(uint4 (&v)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = uint4{};
      if (left > 0) v[i] = *reinterpret_cast<const uint4*>(next);
      left -= turns;
      next += first_step;
      first_step = step;
    }
  }
};

}  // namespace flashmla::sm90::merge
