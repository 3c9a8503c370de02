#include "sm90/dense_decode/fp8/launch.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>

#include "sm90/dense_decode/config.h"
#include "sm90/dense_decode/fp8/formats.cuh"
#include "sm90/dense_decode/fp8/kernels.h"
#include "sm90/dense_decode/fp8/wide/launch.h"
#include "sm90/host/launch.h"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

Status check_supported(const DenseDecodeParams& params) {
  if (params.d_v != kValueDim || params.block_size % kLeastPiece != 0) {
    return Status::InvalidArgument(
        "the Hopper dense_decode kernel takes d_v = 512 and a block_size that is a multiple of " +
        std::to_string(kLeastPiece) + " over fp8 caches, got d_v = " + std::to_string(params.d_v) +
        ", block_size = " + std::to_string(params.block_size));
  }
  if (params.dtype != DType::kBFloat16) {
    return Status::InvalidArgument(
        "the Hopper dense_decode kernel takes bf16 queries over fp8 caches");
  }
  return Status::Ok();
}

Status launch(const DenseDecodeParams& params, int tile_rows, int row_tiles, cudaStream_t stream) {
  const bool v32 = params.format == Format::kV32;
  KernelArgs args;
  args.piece = kTileTokens;
  if (params.block_size % kTileTokens != 0) {
    args.piece = std::gcd(params.block_size, v32 ? V32::kCopyTokens : Fp8Row::kCopyTokens);
  }
  args.pieces = kTileTokens / args.piece;
  args.blocks = static_cast<const uint8_t*>(params.blocks);
  args.num_blocks = static_cast<int>(std::min<int64_t>(params.num_blocks, INT32_MAX));
  args.block_bytes = params.block_bytes;
  args.q = static_cast<const uint8_t*>(params.q);
  args.kv_scale = params.kv_scale;
  args.block_table = params.block_table;
  args.cache_seqlens = params.cache_seqlens;
  args.cuts = params.cuts;
  args.out = params.out;
  args.lse = params.lse;
  args.out_accum = params.out_accum;
  args.lse_accum = params.lse_accum;
  args.b = params.b;
  args.rows = params.s_q * params.h_q;
  args.s_q = params.s_q;
  args.h_q = params.h_q;
  args.block_size = params.block_size;
  args.max_blocks = params.max_blocks;
  args.max_tokens = params.max_blocks * params.block_size;
  args.scale_log2 = params.sm_scale * 1.4426950408889634f;
  args.causal = params.causal;
  // A tile that several blocks read must stay in L2 until the last has read it.
  args.cache_hint = row_tiles > 1 ? kEvictNormal : kEvictFirst;
  const dim3 grid(row_tiles, params.num_parts);
  if (v32 && params.tile_rows == kFewRows && tile_rows > kFewRows) {
    return wide::launch(params, args, tile_rows, grid, stream);
  }
  return (v32 ? launch_v32 : launch_fp8_row)(args, tile_rows, grid, stream);
}

}  // namespace flashmla::sm90::dense_decode::fp8
