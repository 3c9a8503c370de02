// score_block for one instruction set, as cpu/each_isa.h says.

namespace flashmla::cpu::FLASHMLA_ISA {

constexpr int kLanes = FLASHMLA_LANES;
constexpr int kVectors = FLASHMLA_REGISTERS / 8;  // x kHeadGroup sums stay in registers
constexpr int kPanel = kVectors * kLanes;         // tokens
static_assert(kIndexBlockSize % kPanel == 0);
typedef float Floats __attribute__((vector_size(4 * kLanes)));

FLASHMLA_TARGET inline Floats load(const float* from) {
  Floats vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// A NaN stays one, so that its token is never selected.
FLASHMLA_TARGET inline Floats relu(Floats x) { return x < 0.0f ? Floats{} : x; }

// Codes [64, 128] as floats [64 / kPanel, 128, kPanel].
FLASHMLA_TARGET inline void load_codes(const uint8_t* codes, const float* value_of, float* keys) {
  for (int panel = 0; panel < kIndexBlockSize; panel += kPanel, codes += kPanel * kIndexColumns) {
    for (int k = 0; k < kIndexColumns; ++k, keys += kPanel) {
      for (int t = 0; t < kPanel; ++t) keys[t] = value_of[codes[t * kIndexColumns + k]];
    }
  }
}

// The panel's scores for one query token, without the keys' scales.
FLASHMLA_TARGET inline void score_panel(const float* q, const float* weights, int head_groups,
                                        const float* keys, Floats (&scores)[kVectors]) {
  FLASHMLA_UNROLL for (int v = 0; v < kVectors; ++v) scores[v] = Floats{};
  for (int group = 0; group < head_groups; ++group, weights += kHeadGroup) {
    Floats sum[kHeadGroup][kVectors];
    FLASHMLA_UNROLL for (int h = 0; h < kHeadGroup; ++h) {
      FLASHMLA_UNROLL for (int v = 0; v < kVectors; ++v) sum[h][v] = Floats{};
    }
    const float* key_column = keys;
    for (int k = 0; k < kIndexColumns; ++k, q += kHeadGroup, key_column += kPanel) {
      Floats key[kVectors];
      FLASHMLA_UNROLL for (int v = 0; v < kVectors; ++v) key[v] = load(key_column + v * kLanes);
      FLASHMLA_UNROLL for (int h = 0; h < kHeadGroup; ++h) {
        FLASHMLA_UNROLL for (int v = 0; v < kVectors; ++v) sum[h][v] += key[v] * q[h];
      }
    }
    FLASHMLA_UNROLL for (int h = 0; h < kHeadGroup; ++h) {
      FLASHMLA_UNROLL for (int v = 0; v < kVectors; ++v) {
        scores[v] += relu(sum[h][v]) * weights[h];
      }
    }
  }
}

FLASHMLA_TARGET void score_block(const IndexQueries& queries, const uint8_t* block,
                                 const float* value_of, float* scores, int64_t stride) {
  alignas(64) float keys[kIndexBlockSize * kIndexColumns];
  alignas(64) float scales[kIndexBlockSize];
  load_codes(block, value_of, keys);
  std::memcpy(scales, block + kIndexBlockSize * kIndexColumns, sizeof(scales));
  const int64_t heads = int64_t{queries.head_groups} * kHeadGroup;
  // Panels outside: one stays in the first cache while all query tokens use it.
  for (int panel = 0; panel < kIndexBlockSize; panel += kPanel) {
    for (int i = 0; i < queries.num_tokens; ++i) {
      Floats sums[kVectors];
      score_panel(queries.q.data() + i * heads * kIndexColumns, queries.weights.data() + i * heads,
                  queries.head_groups, keys + panel * kIndexColumns, sums);
      float* to = scores + i * stride + panel;
      FLASHMLA_UNROLL for (int v = 0; v < kVectors; ++v) {
        const Floats scaled = sums[v] * load(scales + panel + v * kLanes);
        std::memcpy(to + v * kLanes, &scaled, sizeof(scaled));
      }
    }
  }
}

}  // namespace flashmla::cpu::FLASHMLA_ISA
