#include "sm90/sparse_prefill/kernel.cuh"

namespace flashmla::sm90::sparse_prefill {

template Status launch_kernel<__nv_bfloat16, 576, false>(const KernelArgs&, dim3, cudaStream_t);
template Status launch_kernel<__nv_bfloat16, 576, true>(const KernelArgs&, dim3, cudaStream_t);
template Status launch_kernel<__nv_bfloat16, 512, false>(const KernelArgs&, dim3, cudaStream_t);
template Status launch_kernel<__nv_bfloat16, 512, true>(const KernelArgs&, dim3, cudaStream_t);

}  // namespace flashmla::sm90::sparse_prefill
