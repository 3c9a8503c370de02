#include "cpu/dense_decode.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/attend/attend_piece.h"
#include "cpu/elements.h"
#include "cpu/merge.h"
#include "schedule/pieces.h"

namespace flashmla::cpu {
namespace {

int32_t seqlen_of(const DenseDecodeParams& params, int sequence) {
  const int64_t capacity = int64_t{params.max_blocks} * params.block_size;
  return static_cast<int32_t>(std::clamp<int64_t>(params.cache_seqlens[sequence], 0, capacity));
}

// The cuts to work by. They are made to cover every sequence once, whatever params.cuts holds: each
// is moved into the batch and behind the one before it, the first to the batch's start, the last to
// its end. And a schedule for many workers leaves parts of a tile or two, whose partial results
// cost as much as the attention: so many neighbours are merged that a part has about kPartCost.
// That depends on the arguments alone, not on the threads: neither do the result's bits.
std::vector<Cut> choose_cuts(const DenseDecodeParams& params) {
  constexpr int64_t kPartCost = 8;  // tiles
  int64_t cost = 1;
  for (int i = 0; i < params.b; ++i) cost += num_tiles(seqlen_of(params, i)) + 1;
  const int64_t merged = std::max<int64_t>(1, params.num_parts * kPartCost / cost);

  std::vector<Cut> cuts = {{0, 0}};
  for (int64_t part = merged; part < params.num_parts; part += merged) {
    Cut cut = {params.cuts[2 * part], std::max(params.cuts[2 * part + 1], 0)};
    if (cut.sequence >= params.b) cut = {params.b, 0};
    const Cut last = cuts.back();
    const bool behind =
        cut.sequence != last.sequence ? cut.sequence > last.sequence : cut.tile > last.tile;
    cuts.push_back(behind ? cut : last);
  }
  cuts.push_back({params.b, 0});
  return cuts;
}

template <class Element>
void store_row(const float* acc, float scale, int n, void* to, int64_t row) {
  Element* out = static_cast<Element*>(to) + row * n;
  for (int c = 0; c < n; ++c) out[c] = Element::from_float(acc[c] * scale);
}

// Writes what attend_piece left: to out and lse if the piece is a whole sequence, else to its slot.
void store_piece(const DenseDecodeParams& params, const PieceTask& task, const Piece& piece,
                 int part, const PieceState& state) {
  for (int row = 0; row < task.num_rows; ++row) {
    const float* acc = state.acc + row * state.acc_stride;
    const float sum = state.row_sum[row];
    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
    const float lse_log2 = state.row_max[row] + std::log2(sum);  // -inf where the sum is 0
    const int64_t index = query_index(params, task, row);
    if (piece.continued || piece.unfinished) {
      const int64_t rows = int64_t{params.s_q} * params.h_q;  // of a sequence, so of a slot
      const int64_t slot_row = piece_slot(part, piece.continued) * rows + index % rows;
      float* out = params.out_accum + slot_row * params.d_v;
      for (int c = 0; c < params.d_v; ++c) out[c] = acc[c] * scale;
      params.lse_accum[slot_row] = lse_log2;
    } else {
      with_element(params.dtype, [&](auto element) {
        store_row<decltype(element)>(acc, scale, params.d_v, params.out, index);
      });
      params.lse[index] = lse_log2 * kLn2;
    }
  }
}

}  // namespace

Status run_dense_decode(const DenseDecodeParams& params, const ParallelFor& parallel_for) {
  const std::vector<Cut> cuts = choose_cuts(params);
  const int num_parts = static_cast<int>(cuts.size()) - 1;

  // A task: one part, for one group of rows of one KV head.
  const int rows = params.s_q * (params.h_q / params.h_kv);
  const int groups = (rows + kMaxRows - 1) / kMaxRows;
  parallel_for(num_parts * params.h_kv * groups, [&](int index) {
    static thread_local PieceState state;
    state.resize(params.d_qk, params.d_v);
    const int part = index / (params.h_kv * groups);
    PieceTask task;
    task.kv_head = index / groups % params.h_kv;
    task.row_begin = index % groups * kMaxRows;
    task.num_rows = std::min(rows - task.row_begin, kMaxRows);

    const Cut begin = cuts[part], end = cuts[part + 1];
    for (int sequence = begin.sequence; owns_work(begin, end, sequence); ++sequence) {
      const int32_t seqlen = seqlen_of(params, sequence);
      const Piece piece = piece_of(begin, end, sequence, seqlen);
      task.sequence = sequence;
      task.seqlen = seqlen;
      task.token_begin = int64_t{piece.tile_begin} * kSplitTile;
      task.token_end = std::min<int64_t>(int64_t{piece.tile_end} * kSplitTile, seqlen);
      attend_piece(params, task, state);
      store_piece(params, task, piece, part, state);
    }
  });

  merge(params, cuts, parallel_for);
  return Status::Ok();
}

}  // namespace flashmla::cpu
