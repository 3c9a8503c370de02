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

// The map of a [s_q * h_q, columns] array of which boxes of `rows` by `chunks` of 64 columns are
// copied.
Status make_row_map(const SparsePrefillParams& params, const void* array, int columns, int rows,
                    int chunks, CUtensorMap* map) {
  const bool bf16 = params.dtype == DType::kBFloat16;
  return make_tensor_map(
      array, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      CU_TENSOR_MAP_SWIZZLE_128B,
      {{64, 2, 64},
       {uint64_t(params.s_q) * params.h_q, uint64_t(columns) * 2, uint32_t(rows)},
       {uint64_t(columns) / 64, kChunkRowBytes, uint32_t(chunks)}},
      map);
}

Status make_maps(const SparsePrefillParams& params, KernelArgs* args) {
  Status s = make_row_map(params, params.q, params.d_qk, args->query_box, kHalfChunks,
                          &args->query_half_map);
  if (s.ok())
    s = make_row_map(params, params.q, params.d_qk, args->query_box, 1, &args->query_rope_map);
  if (s.ok()) s = make_row_map(params, params.out, kValueDim, 16, kHalfChunks, &args->out_map);
  return s;
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
                  .sm_scale = params.sm_scale,
                  .scale_log2 = params.sm_scale * 1.4426950408889634f};
  if (Status status = make_maps(params, &args); !status.ok()) return status;
  const int head_tiles = (params.h_q + kTileRows - 1) / kTileRows;
  const dim3 grid(head_tiles, std::clamp(multiprocessors / head_tiles, 1, params.s_q));
  args.query_stride = grid.y;
  if (params.dtype == DType::kBFloat16) {
    return launch_head_dim<__nv_bfloat16>(args, params.d_qk, grid, stream);
  }
  return launch_head_dim<__half>(args, params.d_qk, grid, stream);
}

}  // namespace flashmla::sm90
