#include "sm90/sparse_decode/wide/kernel.cuh"

namespace flashmla::sm90::sparse::wide {
FLASHMLA_WIDE_SPARSE_DECODE(Fp8Row, Fp8Row);
}  // namespace flashmla::sm90::sparse::wide
