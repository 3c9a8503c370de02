#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>

#include "sm90/dense_decode/fp8/launch.h"
#include "sm90/dense_decode/kernel_decl.h"
#include "sm90/dense_decode/launch.h"
#include "sm90/dense_decode/tensor_map.h"
#include "sm90/host/launch.h"
#include "sm90/merge/launch.h"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90 {
namespace dense_decode {
namespace {

bool takes_block_size(int tokens) {
  return tokens >= kMinBlock && tokens <= kMaxBlock && std::has_single_bit(unsigned(tokens));
}

// Query rows that share a tile if there is room: of all query tokens, or of one if there are
// several KV heads.
int rows_together(const DenseDecodeParams& params) {
  return params.h_kv == 1 ? params.s_q * params.h_q : params.h_q / params.h_kv;
}

bool is_fp8(const DenseDecodeParams& params) {
  return params.format == Format::kV32 || params.format == Format::kFp8Row;
}

// How the query rows of a sequence are tiled: rows of a tile at most, and tiles of one KV head.
struct RowTiles {
  int rows, count;
};

// The schedule says which tiles it was made for: 16 where the problem is small, since small tiles
// take less time each but read the cache for each of them; 32 where it is not large, which fp8_row
// alone takes (over v32 there is a kernel for it); else as many rows as there are, up to 64.
RowTiles choose_row_tiles(const DenseDecodeParams& params) {
  const int together = rows_together(params);
  const bool few = params.tile_rows == kFewRows && params.format != Format::kFp8Row;
  const int most = few ? kTileRows : params.tile_rows;
  const int rows = most == kLeastRows ? kLeastRows : std::min(together, most);
  const int count = (together + rows - 1) / rows;
  return {rows, params.h_kv == 1 ? count : params.s_q * count};
}

Status check_dense(const DenseDecodeParams& params) {
  if (params.d_qk != kHeadDim || params.d_v != kValueDim || !takes_block_size(params.block_size)) {
    return Status::InvalidArgument(
        "the Hopper dense_decode kernel takes d_qk = 576, d_v = 512 and block_size = 16, 32, "
        "64, 128 or 256, got d_qk = " +
        std::to_string(params.d_qk) + ", d_v = " + std::to_string(params.d_v) +
        ", block_size = " + std::to_string(params.block_size));
  }
  if (params.dtype == DType::kFloat32) {
    return Status::InvalidArgument("the Hopper dense_decode kernel takes bf16 and f16, got f32");
  }
  // TMA takes strides of 16 bytes, and a map with several heads has them in steps of a chunk.
  const int unit = params.h_kv == 1 ? 8 : 64;
  if (params.row_stride < kHeadDim || params.row_stride % unit != 0) {
    return Status::InvalidArgument(
        "the Hopper dense_decode kernel takes cache rows (row_stride) of "
        "at least 576 elements and a multiple of " +
        std::to_string(unit) + " with h_kv = " + std::to_string(params.h_kv) + ", got " +
        std::to_string(params.row_stride));
  }
  return Status::Ok();
}

Status check_supported(const DenseDecodeParams& params) {
  constexpr const char* kNames[kNumFormats] = {"dense", "v32",     "v32_nope", "v4",
                                               "v41",   "v41_fp4", "fp8_row",  "fp8_index"};
  const auto format = static_cast<unsigned>(params.format);
  if (params.format != Format::kDense && !is_fp8(params)) {
    return Status::InvalidArgument(
        std::string("the Hopper dense_decode kernel takes dense, v32 and fp8_row caches, got ") +
        "format " + (format < kNumFormats ? kNames[format] : "?"));
  }
  if (params.num_blocks < 1) {
    return Status::InvalidArgument("blocks must hold at least one block, got num_blocks = 0");
  }
  if (params.tile_rows != kLeastRows && params.tile_rows != kFewRows &&
      params.tile_rows != kTileRows) {
    return Status::InvalidArgument(
        "the Hopper dense_decode kernel takes tile_rows = 16, 32 or 64, got " +
        std::to_string(params.tile_rows));
  }
  if (is_fp8(params) && params.seen != nullptr) {
    return Status::InvalidArgument(
        "the Hopper dense_decode kernel is not given what query tokens see over fp8 caches");
  }
  if (Status s = is_fp8(params) ? fp8::check_supported(params) : check_dense(params); !s.ok()) {
    return s;
  }
  if (int64_t{params.b} * params.s_q * params.h_q > INT32_MAX) {
    return Status::InvalidArgument("dense_decode takes less than 2^31 query rows (b * s_q * h_q)");
  }
  return require_hopper();
}

// Over a dense cache; row_tiles: of tile_rows query rows at most, of one KV head.
Status launch_dense(const DenseDecodeParams& params, int tile_rows, int row_tiles,
                    cudaStream_t stream) {
  KernelArgs args;
  const int box_tokens = std::min(params.block_size, kTileTokens);
  const int boxes = kTileTokens / box_tokens;
  Status s = make_cache_map(params, box_tokens, kHalfChunks, &args.cache_half_map);
  if (!s.ok()) return s;
  s = make_cache_map(params, box_tokens, 1, &args.cache_rope_map);
  if (!s.ok()) return s;
  // The narrow kernel multiplies with all rows of a box; the wide one needs whole swizzle groups.
  const int row_unit = tile_rows <= kNarrowRows ? 16 : 8;
  args.query_box = (tile_rows + row_unit - 1) / row_unit * row_unit;
  s = make_query_map(params, args.query_box, kHalfChunks, &args.query_half_map);
  if (!s.ok()) return s;
  s = make_query_map(params, args.query_box, 1, &args.query_rope_map);
  if (!s.ok()) return s;
  args.block_table = params.block_table;
  args.cache_seqlens = params.cache_seqlens;
  args.seen = params.seen;
  args.cuts = params.cuts;
  args.out = params.out;
  args.lse = params.lse;
  args.out_accum = params.out_accum;
  args.lse_accum = params.lse_accum;
  args.b = params.b;
  args.s_q = params.s_q;
  args.h_q = params.h_q;
  args.rows = params.s_q * params.h_q;
  args.heads_per_kv = params.h_q / params.h_kv;
  args.head_chunks = static_cast<int>(head_chunks(params));
  args.max_blocks = params.max_blocks;
  args.max_tokens = params.max_blocks * params.block_size;
  args.block_shift = std::countr_zero(unsigned(params.block_size / box_tokens));
  args.scale_log2 = params.sm_scale * 1.4426950408889634f;
  args.causal = params.causal;

  // A tile that several blocks read must stay in L2 until the last has read it.
  args.cache_hint = row_tiles > 1 ? kEvictNormal : kEvictFirst;
  const dim3 grid(row_tiles, params.h_kv, params.num_parts);
  const bool given = params.seen != nullptr;
  const auto launch_kernel = params.dtype == DType::kBFloat16
                                 ? (given ? launch_bf16_given : launch_bf16)
                                 : (given ? launch_f16_given : launch_f16);
  return launch_kernel(args, {tile_rows, boxes}, grid, stream);
}

}  // namespace
}  // namespace dense_decode

Status run_dense_decode(const DenseDecodeParams& params, cudaStream_t stream) {
  using namespace dense_decode;
  if (params.b == 0 || params.s_q * params.h_q == 0) return Status::Ok();
  if (Status status = check_supported(params); !status.ok()) return status;

  const auto [tile_rows, row_tiles] = choose_row_tiles(params);
  Status s = is_fp8(params) ? fp8::launch(params, tile_rows, row_tiles, stream)
                            : launch_dense(params, tile_rows, row_tiles, stream);
  if (!s.ok()) return s;
  const MergeParams merge{.b = params.b,
                          .rows = params.s_q * params.h_q,
                          .h_q = params.h_q,
                          .d_v = params.d_v,
                          .num_parts = params.num_parts,
                          .dtype = params.dtype,
                          .cuts = params.cuts,
                          .out_accum = params.out_accum,
                          .lse_accum = params.lse_accum,
                          .attn_sink = nullptr,
                          .out = params.out,
                          .lse = params.lse};
  return run_merge(merge, /*shares_sm=*/!is_fp8(params) && tile_rows <= kLeastRows, stream);
}

}  // namespace flashmla::sm90
