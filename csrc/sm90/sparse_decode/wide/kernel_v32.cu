#include "sm90/sparse_decode/wide/kernel.cuh"

namespace flashmla::sm90::sparse::wide {
// With bf16 queries the narrow kernel is faster.
template Status launch_kernel<__half, V32, V32>(const KernelArgs&, int, cudaStream_t);
}  // namespace flashmla::sm90::sparse::wide
