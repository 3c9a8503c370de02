#include "sm90/sparse_decode/wide/kernel.cuh"

namespace flashmla::sm90::sparse::wide {
FLASHMLA_WIDE_SPARSE_DECODE(Dense<512>, Dense<512>);
}  // namespace flashmla::sm90::sparse::wide
