#include "cpu/dense_decode.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/attend/attend.h"
#include "cpu/attend/base2.h"
#include "cpu/attend/rows.h"
#include "cpu/merge.h"
#include "elements.h"
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

// Rows are those that read one KV head of one sequence: row r is query r / group, head
// kv_head * group + r % group, where group = h_q / h_kv.
struct PieceTask {
  int sequence, kv_head;
  int row_begin, num_rows;         // num_rows <= kMaxRows
  int32_t seqlen;                  // clamped to the table
  int64_t token_begin, token_end;  // token_end <= seqlen
};

// Index of the row's query in q, out (times d_qk, d_v) and lse, all [b, s_q, h_q, ...].
int64_t query_index(const DenseDecodeParams& params, const PieceTask& task, int row) {
  const int group = params.h_q / params.h_kv;
  const int r = task.row_begin + row;
  return (int64_t{task.sequence} * params.s_q + r / group) * params.h_q + task.kv_head * group +
         r % group;
}

// How many of the sequence's tokens, from its first on, the row attends to.
int64_t visible_tokens(const DenseDecodeParams& params, const PieceTask& task, int row) {
  const int query = (task.row_begin + row) / (params.h_q / params.h_kv);
  if (params.seen != nullptr) return params.seen[int64_t{task.sequence} * params.s_q + query];
  return int64_t{task.seqlen} - (params.causal ? params.s_q - 1 - query : 0);
}

CacheRows cache_rows(const DenseDecodeParams& params, int kv_head) {
  if (params.format == Format::kDense) {
    return CacheRows::dense(params.blocks, params.num_blocks, params.block_bytes, params.dtype,
                            params.d_qk, params.h_kv, kv_head, params.row_stride);
  }
  return CacheRows::coded(params.blocks, params.num_blocks, params.block_bytes, params.block_size,
                          params.format, params.dtype);
}

// What values are multiplied by that attend_tile leaves as codes: 1 but for kFp8Row.
float value_scale(const DenseDecodeParams& params) {
  return params.format == Format::kFp8Row ? *params.kv_scale : 1.0f;
}

// Leaves row_max, row_sum and acc of the piece in `state`.
void attend_piece(const DenseDecodeParams& params, const PieceTask& task, AttendState& state) {
  const float scale = params.sm_scale * kLog2E * value_scale(params);
  state.begin(task.num_rows, params.d_qk, params.d_v);
  for (int row = 0; row < task.num_rows; ++row) {
    const int64_t q = query_index(params, task, row) * params.d_qk * itemsize(params.dtype);
    state.load_query(row, static_cast<const char*>(params.q) + q, params.dtype, scale);
  }
  const CacheRows rows = cache_rows(params, task.kv_head);
  const int32_t* table = params.block_table + int64_t{task.sequence} * params.max_blocks;
  Tile tile;
  for (int64_t token = task.token_begin; token < task.token_end; token += kSplitTile) {
    const int64_t left = task.token_end - token;
    tile.n = static_cast<int>(std::min<int64_t>(kSplitTile, left));
    tile.num_known = static_cast<int>(std::min<int64_t>(kSplitTile + kPrefetchRows, left));
    for (int t = 0; t < tile.num_known; ++t) {
      tile.rows[t] =
          rows.row(table[(token + t) / params.block_size], (token + t) % params.block_size);
    }
    for (int row = 0; row < task.num_rows; ++row) {
      const int64_t visible = visible_tokens(params, task, row) - token;
      tile.visible[row] = static_cast<int>(std::clamp<int64_t>(visible, 0, tile.n));
    }
    attend_tile(rows.format, tile, state);
  }
}

template <class Element>
void store_row(const float* acc, float scale, int n, void* to, int64_t row) {
  Element* out = static_cast<Element*>(to) + row * n;
  for (int c = 0; c < n; ++c) out[c] = Element::from_float(acc[c] * scale);
}

// Writes what attend_piece left: to out and lse if the piece is a whole sequence, else to its slot.
void store_piece(const DenseDecodeParams& params, const PieceTask& task, const Piece& piece,
                 int part, const AttendState& state) {
  for (int row = 0; row < task.num_rows; ++row) {
    const float* acc = state.acc + row * state.acc_stride;
    const float sum = state.row_sum[row];
    const float scale = sum == 0.0f ? 0.0f : value_scale(params) / sum;
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
    static thread_local AttendState state;
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
