#include "sm90/sparse_prefill/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <string>

#include "sm90/host/launch.h"
#include "sm90/host/tensor_map.h"
#include "sm90/sparse_prefill/kernels.h"

namespace flashmla::sm90 {
namespace {

using namespace sparse_prefill;

// More rows than L2 keeps, half of 50 MB near each multiprocessor, are asked of it beforehand.
constexpr int64_t kPrefetchedBytes = 16 << 20;

Status check_supported(const SparsePrefillParams& params) {
  if (params.dtype == DType::kFloat32) {
    return Status::InvalidArgument("the Hopper sparse_prefill kernel takes 16-bit rows");
  }
  if ((params.d_qk != 576 && params.d_qk != 512) || params.d_v != kValueDim) {
    return Status::InvalidArgument(
        "the Hopper sparse_prefill kernel takes d_qk = 576 or 512 and d_v = 512, got d_qk = " +
        std::to_string(params.d_qk) + ", d_v = " + std::to_string(params.d_v));
  }
  return require_hopper();
}

// chunks: of 64 columns, that a load takes.
Status make_query_map(const SparsePrefillParams& params, int box, int chunks, CUtensorMap* map) {
  const bool bf16 = params.dtype == DType::kBFloat16;
  const uint64_t rows = uint64_t(params.s_q) * params.h_q, row_bytes = params.d_qk * 2;
  return make_tensor_map(params.q,
                         bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                         CU_TENSOR_MAP_SWIZZLE_128B,
                         {{64, 2, 64},
                          {rows, row_bytes, uint32_t(box)},
                          {uint64_t(params.d_qk) / 64, kChunkRowBytes, uint32_t(chunks)}},
                         map);
}

template <typename T>
Status launch_head_dim(const KernelArgs& args, int d_qk, dim3 grid, cudaStream_t stream) {
  if (d_qk == 576) return launch_kernel<T, 576>(args, grid, stream);
  return launch_kernel<T, 512>(args, grid, stream);
}

}  // namespace

Status run_sparse_prefill(const SparsePrefillParams& params, cudaStream_t stream) {
  if (int64_t{params.s_q} * params.h_q == 0) return Status::Ok();
  if (Status status = check_supported(params); !status.ok()) return status;
  int multiprocessors = 0;
  if (Status s = count_multiprocessors(&multiprocessors); !s.ok()) return s;
  KernelArgs args{.kv = static_cast<const uint8_t*>(params.kv),
                  .indices = params.indices,
                  .topk_length = params.topk_length,
                  .attn_sink = params.attn_sink,
                  .out = params.out,
                  .lse = params.lse,
                  .max_logits = params.max_logits,
                  .s_q = params.s_q,
                  .h_q = params.h_q,
                  .topk = params.topk,
                  .s_kv = static_cast<uint32_t>(params.s_kv),
                  .query_box = (std::min(params.h_q, kTileRows) + 7) / 8 * 8,
                  .prefetches = int64_t{params.s_kv} * params.d_qk * 2 > kPrefetchedBytes,
                  .sm_scale = params.sm_scale,
                  .scale_log2 = params.sm_scale * 1.4426950408889634f};
  Status status = make_query_map(params, args.query_box, kHalfChunks, &args.query_half_map);
  if (status.ok()) status = make_query_map(params, args.query_box, 1, &args.query_rope_map);
  if (!status.ok()) return status;
  const int head_tiles = (params.h_q + kTileRows - 1) / kTileRows;
  const dim3 grid(head_tiles, std::clamp(multiprocessors / head_tiles, 1, params.s_q));
  args.query_stride = grid.y;
  if (params.dtype == DType::kBFloat16) {
    return launch_head_dim<__nv_bfloat16>(args, params.d_qk, grid, stream);
  }
  return launch_head_dim<__half>(args, params.d_qk, grid, stream);
}

}  // namespace flashmla::sm90
