// attend_piece for one instruction set. attend_piece.cc includes this once for each, having defined
//   FLASHMLA_ISA        namespace
//   FLASHMLA_TARGET     function attribute that turns the instruction set on
//   FLASHMLA_LANES      floats in a register
//   FLASHMLA_REGISTERS  vector registers
// It uses the compilers' vector extensions only. Functions from elsewhere stay outside the
// target attribute, so no function that needs a newer CPU can stand in for an ordinary one.

namespace flashmla::cpu::FLASHMLA_ISA {

constexpr int kLanes = FLASHMLA_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// Blocks of sums that stay in registers, with room left for their operands.
constexpr int kScoreTokens = FLASHMLA_REGISTERS / 8;   // x 4 rows
constexpr int kValueVectors = FLASHMLA_REGISTERS / 8;  // x 4 rows

constexpr int kKeys = 8;        // converted and used at a time, so in the first cache
constexpr int kCacheLine = 64;  // bytes
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
FLASHMLA_TARGET inline Floats load_floats(const Element* from) {
  return to_float(load<Halves>(from), Element{});
}

FLASHMLA_TARGET inline Floats load_floats(const Float32* from) { return load<Floats>(from); }

template <class Element>
FLASHMLA_TARGET void convert(const Element* from, int n, float* to) {
  int k = 0;
  for (; k + kLanes <= n; k += kLanes) store(to + k, load_floats(from + k));
  for (; k < n; ++k) to[k] = Element::to_float(from[k]);
}

template <class Element>
FLASHMLA_TARGET void load_query(const DenseDecodeParams& params, const PieceTask& task,
                                PieceState& state) {
  const float scale = params.sm_scale * 1.44269504088896341f;
  const auto* q = static_cast<const Element*>(params.q);
  for (int row = 0; row < task.num_rows; ++row) {
    float* to = state.query + row * state.key_stride;
    convert(q + query_index(params, task, row) * params.d_qk, params.d_qk, to);
    for (int k = 0; k < params.d_qk; ++k) to[k] *= scale;
  }
}

// The key of a token in the cache; null for a block id out of range.
template <class Element>
FLASHMLA_TARGET const Element* find_key(const DenseDecodeParams& params, const PieceTask& task,
                                        int64_t token) {
  const int64_t block =
      params.block_table[int64_t{task.sequence} * params.max_blocks + token / params.block_size];
  if (block < 0 || block >= params.num_blocks) return nullptr;
  const int64_t slot = block * params.block_size + token % params.block_size;
  return static_cast<const Element*>(params.blocks) +
         (slot * params.h_kv + task.kv_head) * params.row_stride;
}

// keys[0 : kKeys] = the keys from `token` on, with zeros past the piece's end. Meanwhile those
// after them are on their way from memory.
template <class Element>
FLASHMLA_TARGET void load_keys(const DenseDecodeParams& params, const PieceTask& task,
                               int64_t token, int key_stride, float* keys) {
  for (int t = 0; t < kKeys; ++t) {
    float* to = keys + t * key_stride;
    const Element* key =
        token + t < task.token_end ? find_key<Element>(params, task, token + t) : nullptr;
    if (key == nullptr) {
      std::fill_n(to, params.d_qk, 0.0f);
    } else {
      convert(key, params.d_qk, to);
    }
    const int64_t later = token + t + kKeys;
    if (later >= task.token_end) continue;
    const Element* next = find_key<Element>(params, task, later);
    if (next == nullptr) continue;
    for (int k = 0; k < params.d_qk; k += kCacheLine / sizeof(Element))
      __builtin_prefetch(next + k);
  }
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

template <class Element>
FLASHMLA_TARGET void score_tile(const DenseDecodeParams& params, const PieceTask& task,
                                int64_t token, int n, PieceState& state) {
  const int stride = state.key_stride;
  for (int t = 0; t < n; t += kKeys) {
    float* keys = state.tile + t * stride;
    load_keys<Element>(params, task, token + t, stride, keys);
    int row = 0;
    while (row < task.num_rows) {
      const float* query = state.query + row * stride;
      float* weights = state.weights + row * kSplitTile + t;
      const int left = task.num_rows - row;
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

// Scores to weights for one row, which sees the first `limit` of the tile's tokens.
FLASHMLA_TARGET void softmax_row(int row, int64_t limit, PieceState& state) {
  float* weights = state.weights + row * kSplitTile;
  for (int64_t t = std::max<int64_t>(limit, 0); t < kSplitTile; ++t) weights[t] = -kInfinity;
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
FLASHMLA_TARGET void value_columns(int column, int num_rows, int n, PieceState& state) {
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
FLASHMLA_TARGET void value_tile(int num_rows, int n, PieceState& state) {
  int column = 0;
  for (; column + kValueVectors * kLanes <= state.acc_stride; column += kValueVectors * kLanes) {
    value_columns<kValueVectors>(column, num_rows, n, state);
  }
  for (; column < state.acc_stride; column += kLanes) value_columns<1>(column, num_rows, n, state);
}

template <class Element>
FLASHMLA_TARGET void attend(const DenseDecodeParams& params, const PieceTask& task,
                            PieceState& state) {
  load_query<Element>(params, task, state);
  std::fill_n(state.row_max, task.num_rows, -kInfinity);
  std::fill_n(state.row_sum, task.num_rows, 0.0f);
  std::fill_n(state.acc, int64_t{task.num_rows} * state.acc_stride, 0.0f);

  for (int64_t token = task.token_begin; token < task.token_end; token += kSplitTile) {
    const int n = static_cast<int>(std::min<int64_t>(kSplitTile, task.token_end - token));
    score_tile<Element>(params, task, token, n, state);
    for (int row = 0; row < task.num_rows; ++row) {
      softmax_row(row, visible_tokens(params, task, row) - token, state);
    }
    value_tile(task.num_rows, n, state);
  }
}

FLASHMLA_TARGET void attend_piece(const DenseDecodeParams& params, const PieceTask& task,
                                  PieceState& state) {
  switch (params.dtype) {  // with_element's lambda would be outside the target attribute
    case DType::kBFloat16:
      return attend<BFloat16>(params, task, state);
    case DType::kFloat16:
      return attend<Float16>(params, task, state);
    case DType::kFloat32:
      return attend<Float32>(params, task, state);
  }
}

}  // namespace flashmla::cpu::FLASHMLA_ISA

#undef FLASHMLA_ISA
#undef FLASHMLA_TARGET
#undef FLASHMLA_LANES
#undef FLASHMLA_REGISTERS
