// multiply_tile for one instruction set, as cpu/each_isa.h says.

namespace flashmla::cpu::FLASHMLA_ISA {

constexpr int kLanes = FLASHMLA_LANES;
constexpr int kVectors = FLASHMLA_REGISTERS / 8;  // x kGroup sums stay in registers
constexpr int kGroup = 4;                         // rows
typedef float Floats __attribute__((vector_size(4 * kLanes)));

// kGroup rows of sums, `columns` of them, from column j on.
template <int kRows>
FLASHMLA_TARGET inline void multiply_rows(const float* w, const float* x, int depth, int j,
                                          float* sums) {
  Floats sum[kRows][kVectors];
  FLASHMLA_UNROLL for (int i = 0; i < kRows; ++i) {
    std::memcpy(sum[i], sums + i * kColumns + j, sizeof(sum[i]));
  }
  for (int l = 0; l < depth; ++l) {
    Floats weight[kVectors];
    std::memcpy(weight, w + l * kColumns + j, sizeof(weight));
    FLASHMLA_UNROLL for (int i = 0; i < kRows; ++i) {
      FLASHMLA_UNROLL for (int v = 0; v < kVectors; ++v) {
        sum[i][v] += weight[v] * x[i * kDepth + l];
      }
    }
  }
  FLASHMLA_UNROLL for (int i = 0; i < kRows; ++i) {
    std::memcpy(sums + i * kColumns + j, sum[i], sizeof(sum[i]));
  }
}

FLASHMLA_TARGET void multiply_tile(const float* w, const float* x, int rows, int depth,
                                   float* sums) {
  static_assert(kColumns % (kVectors * kLanes) == 0);
  int row = 0;
  for (; row + kGroup <= rows; row += kGroup) {
    for (int j = 0; j < kColumns; j += kVectors * kLanes) {
      multiply_rows<kGroup>(w, x + row * kDepth, depth, j, sums + row * kColumns);
    }
  }
  for (; row < rows; ++row) {
    for (int j = 0; j < kColumns; j += kVectors * kLanes) {
      multiply_rows<1>(w, x + row * kDepth, depth, j, sums + row * kColumns);
    }
  }
}

}  // namespace flashmla::cpu::FLASHMLA_ISA
