#include "sm90/sparse_decode/wide/kernel.cuh"

namespace flashmla::sm90::sparse::wide {
FLASHMLA_WIDE_SPARSE_DECODE(V41, V41);
}  // namespace flashmla::sm90::sparse::wide
