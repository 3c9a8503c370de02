// attend_piece for one instruction set. attend_piece.cc includes this once for each, having defined
//   FLASHMLA_ISA        namespace
//   FLASHMLA_TARGET     function attribute that turns the instruction set on
//   FLASHMLA_LANES      floats in a register
//   FLASHMLA_REGISTERS  vector registers
// Only the compilers' vector extensions are used. Everything included by others stays outside the
// target attribute, so no function that needs a newer CPU can stand in for an ordinary one.

namespace flashmla::cpu::FLASHMLA_ISA {

constexpr int kLanes = FLASHMLA_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// Blocks of sums that stay in registers, with room left for their operands.
constexpr int kScoreTokens = FLASHMLA_REGISTERS / 4;   // x 2 vectors of rows
constexpr int kValueRows = 4;
constexpr int kValueVectors = FLASHMLA_REGISTERS / 8;  // x kValueRows

constexpr int kPrefetch = 32;  // elements in a cache line
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Vector, class T>
FLASHMLA_TARGET inline Vector load(const T* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class Vector, class T>
FLASHMLA_TARGET inline void store(T* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

FLASHMLA_TARGET inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

// 2^x for x <= 0 within 2 units in the last place; 0 below 2^-125; NaN stays NaN.
FLASHMLA_TARGET inline Floats exp2(Floats x) {
  const Floats clamped = x > -125.0f ? x : Floats{} - 125.0f;
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = clamped + kRound;
  const Floats f = clamped - (shifted - kRound);  // in [-0.5, 0.5]
  Floats y = f * 1.54035304e-4f + 1.33335581e-3f;  // Taylor series of 2^f
  y = y * f + 9.61812911e-3f;
  y = y * f + 5.55041087e-2f;
  y = y * f + 2.40226507e-1f;
  y = y * f + 6.93147181e-1f;
  y = y * f + 1.0f;
  y = (Floats)((Ints)y + ((Ints)shifted << 23));  // exponent += the integer
  y = x < -125.0f ? Floats{} : y;
  return x == x ? y : x;
}

FLASHMLA_TARGET inline Floats to_float(Halves from, BFloat16) {
  return (Floats)(__builtin_convertvector(from, Words) << 16);
}

FLASHMLA_TARGET inline Floats to_float(Halves from, Float16) {  // as Float16::to_float
  const Words bits = __builtin_convertvector(from, Words);
  const Words sign = (bits & 0x8000u) << 16;
  const Words magnitude = (bits & 0x7fffu) << 13;
  const Words denormal = (Words)((Floats)(magnitude + 0x38800000u) - 0x1p-14f);
  Words result = magnitude + 0x38000000u;
  result = magnitude < 0x00800000u ? denormal : result;
  result = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : result;
  return (Floats)(sign | result);
}

template <class Element>
FLASHMLA_TARGET void convert(const Element* from, int n, float* to) {
  int k = 0;
  for (; k + kLanes <= n; k += kLanes) store(to + k, to_float(load<Halves>(from + k), Element{}));
  for (; k < n; ++k) to[k] = Element::to_float(from[k]);
}

// query[row / kLanes, :, row % kLanes] = q of the row * sm_scale * log2(e); rows past the last are 0.
template <class Element>
FLASHMLA_TARGET void load_query(const DenseDecodeParams& params, const PieceTask& task,
                                Attention& state) {
  const float scale = params.sm_scale * 1.44269504088896341f;
  const auto* q = static_cast<const Element*>(params.q);
  for (int row = 0; row < (task.num_rows + kLanes - 1) / kLanes * kLanes; ++row) {
    float* to = state.query + int64_t{row / kLanes} * params.d_qk * kLanes + row % kLanes;
    if (row >= task.num_rows) {
      for (int k = 0; k < params.d_qk; ++k) to[k * kLanes] = 0.0f;
      continue;
    }
    const Element* from = q + query_index(params, task, row) * params.d_qk;
    for (int k = 0; k < params.d_qk; ++k) to[k * kLanes] = Element::to_float(from[k]) * scale;
  }
}

// The key of a token in the cache; null for a block id out of range.
template <class Element>
FLASHMLA_TARGET const Element* find_key(const DenseDecodeParams& params, const PieceTask& task,
                                        int64_t token) {
  const int64_t block = params.block_table[int64_t{task.sequence} * params.max_blocks +
                                           token / params.block_size];
  if (block < 0 || block >= params.num_blocks) return nullptr;
  const int64_t slot = block * params.block_size + token % params.block_size;
  return static_cast<const Element*>(params.blocks) +
         (slot * params.h_kv + task.kv_head) * params.d_qk;
}

// tile[t, :] = the key of token `token` + t for kScoreTokens tokens from t = first, with zeros past the
// piece's end. Meanwhile the keys after these are on their way from memory.
template <class Element>
FLASHMLA_TARGET void load_keys(const DenseDecodeParams& params, const PieceTask& task, int64_t token,
                               int first, Attention& state) {
  for (int t = first; t < first + kScoreTokens; ++t) {
    float* to = state.tile + t * state.tile_stride;
    const Element* key =
        token + t < task.token_end ? find_key<Element>(params, task, token + t) : nullptr;
    if (key == nullptr) {
      std::fill_n(to, params.d_qk, 0.0f);
    } else {
      convert(key, params.d_qk, to);
    }
    const int64_t later = token + t + kScoreTokens;
    if (later >= task.token_end) continue;
    const Element* next = find_key<Element>(params, task, later);
    if (next == nullptr) continue;
    for (int k = 0; k < params.d_qk; k += kPrefetch) __builtin_prefetch(next + k);
  }
}

// weights[v, t] = query[v] . tile[t] for kVectors vectors of rows and kScoreTokens tokens.
template <int kVectors>
FLASHMLA_TARGET void score_block(const float* query, const float* tile, int d_qk, int tile_stride,
                                 float* weights) {
  Floats sum[kScoreTokens][kVectors] = {};
  for (int k = 0; k < d_qk; ++k) {
    Floats q[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      q[v] = load<Floats>(query + (int64_t{v} * d_qk + k) * kLanes);
    }
    for (int t = 0; t < kScoreTokens; ++t) {
      for (int v = 0; v < kVectors; ++v) sum[t][v] += q[v] * tile[t * tile_stride + k];
    }
  }
  for (int t = 0; t < kScoreTokens; ++t) {
    for (int v = 0; v < kVectors; ++v) store(weights + (v * kSplitTile + t) * kLanes, sum[t][v]);
  }
}

// weights = query . tile, a few tokens at a time: their keys are used while in the first cache.
template <class Element>
FLASHMLA_TARGET void score_tile(const DenseDecodeParams& params, const PieceTask& task,
                                int64_t token, int n, Attention& state) {
  const int num_vectors = (task.num_rows + kLanes - 1) / kLanes;
  for (int t = 0; t < n; t += kScoreTokens) {
    load_keys<Element>(params, task, token, t, state);
    const float* tile = state.tile + t * state.tile_stride;
    for (int v = 0; v < num_vectors; v += 2) {
      const float* query = state.query + int64_t{v} * params.d_qk * kLanes;
      float* weights = state.weights + (v * kSplitTile + t) * kLanes;
      const auto block = v + 2 <= num_vectors ? score_block<2> : score_block<1>;
      block(query, tile, params.d_qk, state.tile_stride, weights);
    }
  }
}

// Scores to weights for one vector of rows; a row sees the first `limit` of the n tokens.
FLASHMLA_TARGET void softmax_tile(int v, int n, Ints limit, Attention& state) {
  float* weights = state.weights + v * kSplitTile * kLanes;
  const Floats old_max = load<Floats>(state.row_max + v * kLanes);
  Floats new_max = old_max;
  for (int t = 0; t < n; ++t) {
    Floats score = load<Floats>(weights + t * kLanes);
    score = t < limit ? score : Floats{} - kInfinity;
    store(weights + t * kLanes, score);
    new_max = max(score, new_max);
  }
  // A row that has seen nothing yet: any finite base makes its weights 2^-inf = 0.
  const Floats base = new_max == -kInfinity ? Floats{} : new_max;
  const Floats decay = exp2(old_max - base);
  Floats sum = load<Floats>(state.row_sum + v * kLanes) * decay;
  for (int t = 0; t < n; ++t) {
    const Floats weight = exp2(load<Floats>(weights + t * kLanes) - base);
    store(weights + t * kLanes, weight);
    sum += weight;
  }
  store(state.decay + v * kLanes, decay);
  store(state.row_max + v * kLanes, new_max);
  store(state.row_sum + v * kLanes, sum);
}

// acc = acc * decay + weights . tile for kRows rows (of one vector) and kVectors vectors of columns.
template <int kRows, int kVectors>
FLASHMLA_TARGET void value_block(const float* weights, const float* decay, const float* tile, int n,
                                 int tile_stride, float* acc, int acc_stride) {
  Floats sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) {
      sum[r][c] = load<Floats>(acc + r * acc_stride + c * kLanes) * decay[r];
    }
  }
  for (int t = 0; t < n; ++t) {
    Floats value[kVectors];
    for (int c = 0; c < kVectors; ++c) value[c] = load<Floats>(tile + t * tile_stride + c * kLanes);
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kVectors; ++c) sum[r][c] += value[c] * weights[t * kLanes + r];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kVectors; ++c) store(acc + r * acc_stride + c * kLanes, sum[r][c]);
  }
}

template <int kVectors>
FLASHMLA_TARGET void value_columns(int column, int num_rows, int n, Attention& state) {
  const float* tile = state.tile + column;
  for (int row = 0; row < num_rows; row += kValueRows) {
    const float* weights = state.weights + row / kLanes * kSplitTile * kLanes + row % kLanes;
    float* acc = state.acc + row * state.acc_stride + column;
    const int rows = num_rows - row;
    const auto block = rows >= 4   ? value_block<4, kVectors>
                       : rows == 3 ? value_block<3, kVectors>
                       : rows == 2 ? value_block<2, kVectors>
                                   : value_block<1, kVectors>;
    block(weights, state.decay + row, tile, n, state.tile_stride, acc, state.acc_stride);
  }
}

// Columns outside, rows inside: the tile's columns stay in the first cache while all rows use them.
FLASHMLA_TARGET void value_tile(int num_rows, int n, Attention& state) {
  int column = 0;
  for (; column + kValueVectors * kLanes <= state.acc_stride; column += kValueVectors * kLanes) {
    value_columns<kValueVectors>(column, num_rows, n, state);
  }
  for (; column < state.acc_stride; column += kLanes) value_columns<1>(column, num_rows, n, state);
}

template <class Element>
FLASHMLA_TARGET void attend(const DenseDecodeParams& params, const PieceTask& task,
                            Attention& state) {
  const int num_vectors = (task.num_rows + kLanes - 1) / kLanes;
  load_query<Element>(params, task, state);
  for (int t = 0; t < kSplitTile; ++t) {  // columns that only fill the last vector of values
    std::fill(state.tile + t * state.tile_stride + params.d_qk,
              state.tile + (t + 1) * state.tile_stride, 0.0f);
  }
  std::fill_n(state.row_max, kMaxRows, -kInfinity);
  std::fill_n(state.row_sum, kMaxRows, 0.0f);
  std::fill_n(state.acc, int64_t{task.num_rows} * state.acc_stride, 0.0f);

  for (int64_t token = task.token_begin; token < task.token_end; token += kSplitTile) {
    const int n = static_cast<int>(std::min<int64_t>(kSplitTile, task.token_end - token));
    score_tile<Element>(params, task, token, n, state);
    for (int v = 0; v < num_vectors; ++v) {
      const Ints limit = load<Ints>(state.limit + v * kLanes) - static_cast<int32_t>(token);
      softmax_tile(v, n, limit, state);
    }
    value_tile(task.num_rows, n, state);
  }
}

FLASHMLA_TARGET void attend_piece(const DenseDecodeParams& params, const PieceTask& task,
                                  Attention& state) {
  const int group = params.h_q / params.h_kv;
  std::fill_n(state.limit, kMaxRows, 0);
  for (int row = 0; row < task.num_rows; ++row) {
    const int query = (task.row_begin + row) / group;
    const int hidden = params.causal ? params.s_q - 1 - query : 0;
    state.limit[row] = std::max(task.seqlen - hidden, 0);
  }
  if (params.dtype == DType::kBFloat16) return attend<BFloat16>(params, task, state);
  attend<Float16>(params, task, state);
}

}  // namespace flashmla::cpu::FLASHMLA_ISA

#undef FLASHMLA_ISA
#undef FLASHMLA_TARGET
#undef FLASHMLA_LANES
#undef FLASHMLA_REGISTERS
