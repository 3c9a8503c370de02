// Attention of a group of query rows to rows of a cache, a tile of tokens at a time, whichever
// tokens the caller picks: the inner work of the attention operations.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/attend/rows.h"
#include "schedule/pieces.h"

namespace flashmla::cpu {

constexpr int kMaxRows = 64;      // query rows that share one conversion of a tile to float
constexpr int kPrefetchRows = 8;  // cache rows on their way from memory while those before are used

// The tokens to attend to next.
struct Tile {
  int n;          // at most kSplitTile
  int num_known;  // at least n: rows past n are only prefetched
  Row rows[kSplitTile + kPrefetchRows];
  int visible[kMaxRows];  // each query row sees the first so many of the n
};

// One thread's working memory, and the state of the online softmax. It outlives calls: begin and
// attend_tile write all that is read, padding columns too, whatever was there before. Scores are in
// base 2: 2^score is the weight of a token.
class AttendState {
 public:
  // For query rows of d_qk columns, whose values have d_v; none of them has seen a token.
  void begin(int num_rows, int d_qk, int d_v);

  // Query row `row` times a scale, which includes log2(e).
  void load_query(int row, const void* q, DType dtype, float scale);

  int num_rows, d_qk;
  int key_stride = 0, acc_stride = 0;  // floats, multiples of kAlignment
  float* query;                        // [kMaxRows, key_stride] columns past d_qk are 0
  float* tile;     // [kSplitTile, key_stride] keys, whose first d_v columns are the values; so too
  float* weights;  // [kMaxRows, kSplitTile] scores, then 2^(score - row_max)
  float* decay;    // [kMaxRows] 2^(row_max before - row_max after a tile)
  float* row_max;  // [kMaxRows] largest score so far, -inf where there is none
  float* row_sum;  // [kMaxRows] sum of 2^(score - row_max)
  float* acc;      // [kMaxRows, acc_stride] sum of 2^(score - row_max) * value

 private:
  static constexpr int kAlignment = 16;  // floats: the widest vector, and a cache line
  void resize(int d_qk, int d_v);
  std::vector<float> storage_;
};

// Adds a tile to row_max, row_sum and acc.
void attend_tile(const RowFormat& format, const Tile& tile, AttendState& state);

}  // namespace flashmla::cpu
