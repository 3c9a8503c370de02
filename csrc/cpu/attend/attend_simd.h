// attend_tile for one instruction set, as cpu/each_isa.h says.

#include "cpu/attend/load_simd.h"

namespace flashmla::cpu::FLASHMLA_ISA {

// Blocks of sums that stay in registers, with room left for their operands.
constexpr int kScoreTokens = FLASHMLA_REGISTERS / 8;   // x 4 rows
constexpr int kValueVectors = FLASHMLA_REGISTERS / 8;  // x 4 rows

constexpr int kKeys = 8;  // converted and used at a time, so in the first cache
constexpr float kInfinity = std::numeric_limits<float>::infinity();

FLASHMLA_TARGET inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

FLASHMLA_TARGET inline float sum_of_lanes(Floats x) {
  Quad quads[kLanes / 4];
  store(quads, x);
  for (int n = kLanes / 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) quads[i] += quads[i + n];
  }
  return (quads[0][0] + quads[0][1]) + (quads[0][2] + quads[0][3]);
}

FLASHMLA_TARGET inline float max_of_lanes(Floats x) {
  float lanes[kLanes];
  store(lanes, x);
  float result = lanes[0];
  for (int i = 1; i < kLanes; ++i) result = std::max(result, lanes[i]);
  return result;
}

// 2^x for x <= 0 within 2 units in the last place; 0 below 2^-125; NaN stays NaN.
FLASHMLA_TARGET inline Floats exp2(Floats x) {
  const Floats clamped = x > -125.0f ? x : Floats{} - 125.0f;
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = clamped + kRound;
  const Floats f = clamped - (shifted - kRound);  // in [-0.5, 0.5]
  // The polynomial of least relative error (2e-9) whose last coefficient is 1.
  Floats y = f * 1.5353359e-4f + 1.33988739e-3f;
  y = y * f + 9.61843692e-3f;
  y = y * f + 5.55033237e-2f;
  y = y * f + 2.40226477e-1f;
  y = y * f + 6.93147182e-1f;
  y = y * f + 1.0f;
  y = (Floats)((Words)y + ((Words)shifted << 23));  // exponent += the integer
  y = x < -125.0f ? Floats{} : y;
  return x == x ? y : x;
}

// weights[r, t] = query[r] . keys[t] for kKeys keys, kTokens of them at a time.
template <int kRows, int kTokens>
FLASHMLA_TARGET void score_block(const float* query, const float* keys, int stride,
                                 float* weights) {
  for (int first = 0; first < kKeys; first += kTokens, keys += kTokens * stride) {
    Floats sum[kRows * kTokens];
    FLASHMLA_UNROLL for (int i = 0; i < kRows * kTokens; ++i) sum[i] = Floats{};
    for (int k = 0; k < stride; k += kLanes) {
      Floats key[kTokens];
      FLASHMLA_UNROLL for (int t = 0; t < kTokens; ++t) {
        key[t] = load<Floats>(keys + t * stride + k);
      }
      FLASHMLA_UNROLL for (int r = 0; r < kRows; ++r) {
        const Floats q = load<Floats>(query + r * stride + k);
        FLASHMLA_UNROLL for (int t = 0; t < kTokens; ++t) sum[r * kTokens + t] += q * key[t];
      }
    }
    FLASHMLA_UNROLL for (int r = 0; r < kRows; ++r) {
      FLASHMLA_UNROLL for (int t = 0; t < kTokens; ++t) {
        weights[r * kSplitTile + first + t] = sum_of_lanes(sum[r * kTokens + t]);
      }
    }
  }
}

// Converts kKeys rows from `first` on, with zeros past the tile's end, while those after them are
// on their way from memory.
FLASHMLA_TARGET inline void load_keys(const RowLoader& loader, const Tile& tile, int first,
                                      AttendState& state) {
  for (int t = first; t < first + kKeys; ++t) {
    float* to = state.tile + t * state.key_stride;
    if (t < tile.n && tile.rows[t].plane[0] != nullptr) {
      loader.load(tile.rows[t], state.d_qk, to);
    } else {
      std::fill_n(to, state.d_qk, 0.0f);
    }
    if (t + kPrefetchRows < tile.num_known) loader.prefetch(tile.rows[t + kPrefetchRows]);
  }
}

FLASHMLA_TARGET inline void score_tile(const RowLoader& loader, const Tile& tile,
                                       AttendState& state) {
  const int stride = state.key_stride;
  for (int t = 0; t < tile.n; t += kKeys) {
    load_keys(loader, tile, t, state);
    const float* keys = state.tile + t * stride;
    int row = 0;
    while (row < state.num_rows) {
      const float* query = state.query + row * stride;
      float* weights = state.weights + row * kSplitTile + t;
      const int left = state.num_rows - row;
      if (left >= 4) {
        score_block<4, kScoreTokens>(query, keys, stride, weights);
        row += 4;
      } else if (left >= 2) {
        score_block<2, 4>(query, keys, stride, weights);
        row += 2;
      } else {
        score_block<1, 8>(query, keys, stride, weights);
        row += 1;
      }
    }
  }
}

// Scores to weights for one row, which sees the first `visible` of the tile's tokens.
FLASHMLA_TARGET void softmax_row(int row, int visible, AttendState& state) {
  float* weights = state.weights + row * kSplitTile;
  std::fill(weights + visible, weights + kSplitTile, -kInfinity);
  Floats tile_max = load<Floats>(weights);
  for (int t = kLanes; t < kSplitTile; t += kLanes) {
    tile_max = max(load<Floats>(weights + t), tile_max);
  }
  const float old_max = state.row_max[row];
  const float new_max = std::max(old_max, max_of_lanes(tile_max));
  // A row that has seen nothing yet: any finite base makes its weights 2^-inf = 0.
  const float base = new_max == -kInfinity ? 0.0f : new_max;
  const float decay = exp2(Floats{} + (old_max - base))[0];
  Floats sum = {};
  for (int t = 0; t < kSplitTile; t += kLanes) {
    const Floats weight = exp2(load<Floats>(weights + t) - base);
    store(weights + t, weight);
    sum += weight;
  }
  state.decay[row] = decay;
  state.row_max[row] = new_max;
  state.row_sum[row] = state.row_sum[row] * decay + sum_of_lanes(sum);
}

// acc = acc * decay + weights . tile for kRows rows and kVectors vectors of columns.
template <int kRows, int kVectors>
FLASHMLA_TARGET void value_block(const float* weights, const float* decay, const float* tile, int n,
                                 int tile_stride, float* acc, int acc_stride) {
  Floats sum[kRows][kVectors];
  FLASHMLA_UNROLL for (int r = 0; r < kRows; ++r) {
    FLASHMLA_UNROLL for (int c = 0; c < kVectors; ++c) {
      sum[r][c] = load<Floats>(acc + r * acc_stride + c * kLanes) * decay[r];
    }
  }
  for (int t = 0; t < n; ++t) {
    Floats value[kVectors];
    FLASHMLA_UNROLL for (int c = 0; c < kVectors; ++c) {
      value[c] = load<Floats>(tile + t * tile_stride + c * kLanes);
    }
    FLASHMLA_UNROLL for (int r = 0; r < kRows; ++r) {
      FLASHMLA_UNROLL for (int c = 0; c < kVectors; ++c) {
        sum[r][c] += value[c] * weights[r * kSplitTile + t];
      }
    }
  }
  FLASHMLA_UNROLL for (int r = 0; r < kRows; ++r) {
    FLASHMLA_UNROLL for (int c = 0; c < kVectors; ++c) {
      store(acc + r * acc_stride + c * kLanes, sum[r][c]);
    }
  }
}

template <int kVectors>
FLASHMLA_TARGET void value_columns(int column, int num_rows, int n, AttendState& state) {
  const float* tile = state.tile + column;
  int rows;
  for (int row = 0; row < num_rows; row += rows) {
    const int left = num_rows - row;
    rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const auto block = rows == 4   ? value_block<4, kVectors>
                       : rows == 2 ? value_block<2, kVectors>
                                   : value_block<1, kVectors>;
    block(state.weights + row * kSplitTile, state.decay + row, tile, n, state.key_stride,
          state.acc + row * state.acc_stride + column, state.acc_stride);
  }
}

// Columns outside, rows inside: the tile's columns stay in the first cache while all rows use them.
FLASHMLA_TARGET void value_tile(int num_rows, int n, AttendState& state) {
  int column = 0;
  for (; column + kValueVectors * kLanes <= state.acc_stride; column += kValueVectors * kLanes) {
    value_columns<kValueVectors>(column, num_rows, n, state);
  }
  for (; column < state.acc_stride; column += kLanes) value_columns<1>(column, num_rows, n, state);
}

FLASHMLA_TARGET void attend_tile(const RowFormat& format, const Tile& tile, AttendState& state) {
  score_tile(find_loader(format), tile, state);
  for (int row = 0; row < state.num_rows; ++row) softmax_row(row, tile.visible[row], state);
  value_tile(state.num_rows, tile.n, state);
}

}  // namespace flashmla::cpu::FLASHMLA_ISA
