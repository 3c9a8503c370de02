#include "sm90/sparse_prefill/kernel.cuh"

namespace flashmla::sm90::sparse_prefill {

template Status launch_kernel<__half, 576>(const KernelArgs&, dim3, cudaStream_t);
template Status launch_kernel<__half, 512>(const KernelArgs&, dim3, cudaStream_t);

}  // namespace flashmla::sm90::sparse_prefill
