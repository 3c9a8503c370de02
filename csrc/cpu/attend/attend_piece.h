// The inner work of dense_decode: one run of tokens of one sequence against a group of query rows.
#pragma once

#include <cstdint>
#include <vector>

#include "params/dense_decode.h"
#include "schedule/pieces.h"

namespace flashmla::cpu {

constexpr int kMaxRows = 64;  // query rows that share one conversion of a tile to float

// Rows are those that read one KV head of one sequence: row r is query r / group, head
// kv_head * group + r % group, where group = h_q / h_kv.
struct PieceTask {
  int sequence, kv_head;
  int row_begin, num_rows;         // num_rows <= kMaxRows
  int32_t seqlen;                  // clamped to the table
  int64_t token_begin, token_end;  // token_end <= seqlen
};

// One thread's working memory, and the state of the online softmax that a piece leaves there.
// Scores are in base 2: 2^score is the weight of a token.
class PieceState {
 public:
  void resize(int d_qk, int d_v);

  int key_stride = 0, acc_stride = 0;  // floats, multiples of kAlignment
  float* query;    // [kMaxRows, key_stride] times sm_scale * log2(e); columns past d_qk are 0
  float* tile;     // [kSplitTile, key_stride] keys, whose first d_v columns are the values; so too
  float* weights;  // [kMaxRows, kSplitTile] scores, then 2^(score - row_max)
  float* decay;    // [kMaxRows] 2^(row_max before - row_max after a tile)
  float* row_max;  // [kMaxRows] largest score so far, -inf where there is none
  float* row_sum;  // [kMaxRows] sum of 2^(score - row_max)
  float* acc;      // [kMaxRows, acc_stride] sum of 2^(score - row_max) * value

 private:
  static constexpr int kAlignment = 16;  // floats: the widest vector, and a cache line
  std::vector<float> storage_;
};

// Index of the row's query in q, out (times d_qk, d_v) and lse, all [b, s_q, h_q, ...].
inline int64_t query_index(const DenseDecodeParams& params, const PieceTask& task, int row) {
  const int group = params.h_q / params.h_kv;
  const int r = task.row_begin + row;
  return (int64_t{task.sequence} * params.s_q + r / group) * params.h_q + task.kv_head * group +
         r % group;
}

// How many of the sequence's tokens, from its first on, the row attends to.
inline int64_t visible_tokens(const DenseDecodeParams& params, const PieceTask& task, int row) {
  const int query = (task.row_begin + row) / (params.h_q / params.h_kv);
  return int64_t{task.seqlen} - (params.causal ? params.s_q - 1 - query : 0);
}

// Leaves row_max, row_sum and acc of the piece in `state`.
void attend_piece(const DenseDecodeParams& params, const PieceTask& task, PieceState& state);

}  // namespace flashmla::cpu
