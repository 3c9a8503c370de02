#include "sm90/sparse_decode/wide/kernel.cuh"

namespace flashmla::sm90::sparse::wide {
FLASHMLA_WIDE_SPARSE_DECODE(V32Nope, V32Nope);
}  // namespace flashmla::sm90::sparse::wide
