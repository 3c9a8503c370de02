#include "sm90/dense_decode/fp8/wide/launch.h"

#include "sm90/dense_decode/fp8/formats.cuh"
#include "sm90/dense_decode/fp8/wide/kernel.h"
#include "sm90/dense_decode/tensor_map.h"
#include "sm90/host/tensor_map.h"

namespace flashmla::sm90::dense_decode::fp8::wide {
namespace {

// Of eight tokens 512 codes, 128 columns after 128; and what follows them in their rows.
Status make_row_maps(const DenseDecodeParams& params, WideArgs* args) {
  constexpr uint32_t kColumns = 128, kRest = V32::kRowBytes - kValueDim;
  const TensorDim tokens{static_cast<uint64_t>(params.block_size), V32::kRowBytes, kGroupTokens};
  const TensorDim blocks{static_cast<uint64_t>(args->num_blocks),
                         static_cast<uint64_t>(params.block_bytes), 1};
  const Status status =
      make_tensor_map(args->blocks, CU_TENSOR_MAP_DATA_TYPE_UINT8, CU_TENSOR_MAP_SWIZZLE_128B,
                      {{kColumns, 1, kColumns},
                       tokens,
                       {kValueDim / kColumns, kColumns, kValueDim / kColumns},
                       blocks},
                      &args->code_map);
  if (!status.ok()) return status;
  return make_tensor_map(args->blocks + kValueDim, CU_TENSOR_MAP_DATA_TYPE_UINT8,
                         CU_TENSOR_MAP_SWIZZLE_NONE, {{kRest, 1, kRest}, tokens, blocks},
                         &args->rest_map);
}

}  // namespace

Status launch(const DenseDecodeParams& params, const KernelArgs& args, int tile_rows, dim3 grid,
              cudaStream_t stream) {
  WideArgs wide;
  static_cast<KernelArgs&>(wide) = args;
  wide.query_box = (tile_rows + 7) / 8 * 8;  // whole swizzle groups
  wide.entry_step = kTileTokens / params.block_size;
  wide.token_step = kTileTokens % params.block_size;
  Status status = make_query_map(params, wide.query_box, kHalfChunks, &wide.query_half_map);
  if (!status.ok()) return status;
  status = make_query_map(params, wide.query_box, 1, &wide.query_rope_map);
  if (!status.ok()) return status;
  status = make_row_maps(params, &wide);
  if (!status.ok()) return status;
  return launch_kernel(wide, grid, stream);
}

}  // namespace flashmla::sm90::dense_decode::fp8::wide
