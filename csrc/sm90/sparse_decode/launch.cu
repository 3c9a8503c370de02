#include "sm90/sparse_decode/launch.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "sm90/host/launch.h"
#include "sm90/merge/launch.h"
#include "sm90/sparse_decode/narrow/kernels.h"
#include "sm90/sparse_decode/wide/launch.h"

namespace flashmla::sm90 {
namespace {

// Rows of the narrow kernel's head tiles: as many heads as there are, up to 64; but 16 if the
// schedule has so few parts that the multiprocessors take all such tiles at once, as schedules of
// small problems do. Small tiles take less time each; but each gathers the rows for itself.
int narrow_rows(const SparseDecodeParams& params, int multiprocessors) {
  const int64_t tiles = (params.h_q + 15) / 16;
  if (tiles == 1 || tiles * params.num_parts <= multiprocessors) return 16;
  return params.h_q <= 32 ? 32 : 64;
}

// Whether the narrow kernel takes the call, with head tiles of `rows`: the format that it has, but
// for tiles of 64 heads, whose rows the wide kernel converts once for both products.
bool is_narrow(const SparseDecodeParams& params, int rows) {
  return rows < 64 && params.main.format == Format::kV32 && params.extra.blocks == nullptr &&
         params.dtype == DType::kBFloat16;
}

Status check_source(const SparseSource& source) {
  if (source.layer_blocks * source.block_size > INT32_MAX) {
    return Status::InvalidArgument("sparse_decode takes layers of less than 2^31 slots");
  }
  if (source.format == Format::kV4 && source.block_size > 1 << 24) {
    return Status::InvalidArgument("the Hopper sparse_decode kernel takes v4 blocks of at most " +
                                   std::to_string(1 << 24) + " tokens");
  }
  if (source.format == Format::kDense && source.row_stride % 8 != 0) {
    return Status::InvalidArgument(
        "the Hopper sparse_decode kernel takes rows a multiple of 8 columns wide, got " +
        std::to_string(source.row_stride));
  }
  return Status::Ok();
}

Status check_supported(const SparseDecodeParams& params) {
  if (params.dtype == DType::kFloat32) {
    return Status::InvalidArgument("the Hopper sparse_decode kernel takes 16-bit queries");
  }
  if ((params.d_qk != 576 && params.d_qk != 512) || params.d_v != sparse::kValueDim) {
    return Status::InvalidArgument(
        "the Hopper sparse_decode kernel takes d_qk = 576 or 512 and d_v = 512, got d_qk = " +
        std::to_string(params.d_qk) + ", d_v = " + std::to_string(params.d_v));
  }
  if (Status s = check_source(params.main); !s.ok()) return s;
  if (params.extra.blocks != nullptr) {
    if (Status s = check_source(params.extra); !s.ok()) return s;
  }
  return require_hopper();
}

// With which n / d is (n * inverse >> 32) >> shift for n < 2^31: the rounded-up 2^(32 + shift) / d,
// shift = ceil(log2(d)) - 1; for 1 that does not fit and is 0. (Granlund, Montgomery: Division by
// invariant integers.)
void make_divisor(uint32_t d, uint32_t* inverse, uint32_t* shift) {
  *shift = d > 1 ? 31 - __builtin_clz(d - 1) : 0;
  *inverse = static_cast<uint32_t>(((uint64_t{1} << (32 + *shift)) + d - 1) / d);
}

sparse::SourceArgs make_source(const SparseSource& source) {
  uint32_t inverse = 0, shift = 0;
  if (source.blocks != nullptr) make_divisor(source.block_size, &inverse, &shift);
  return {.blocks = static_cast<const uint8_t*>(source.blocks),
          .first_block = source.first_block,
          .indices = source.indices,
          .topk_length = source.topk_length,
          .block_bytes = source.block_bytes,
          .row_bytes = source.format == Format::kDense ? source.row_stride * 2
                                                       : layout_of(source.format).plane_bytes[0],
          .last_first_block = std::max<int64_t>(source.num_blocks - source.layer_blocks, 0),
          .topk = source.topk,
          .block_size = source.block_size,
          .layer_slots = static_cast<uint32_t>(std::min(source.layer_blocks, source.num_blocks) *
                                               source.block_size),
          .inverse = inverse,
          .shift = shift};
}

// The merge's view: a schedule row is a query token, whose rows are its heads.
MergeParams merge_params(const SparseDecodeParams& params) {
  return {.b = params.b * params.s_q,
          .rows = params.h_q,
          .h_q = params.h_q,
          .d_v = params.d_v,
          .num_parts = params.num_parts,
          .dtype = params.dtype,
          .cuts = params.cuts,
          .out_accum = params.out_accum,
          .lse_accum = params.lse_accum,
          .attn_sink = params.attn_sink,
          .out = params.out,
          .lse = params.lse};
}

}  // namespace

Status run_sparse_decode(const SparseDecodeParams& params, cudaStream_t stream) {
  if (int64_t{params.b} * params.s_q * params.h_q == 0) return Status::Ok();
  if (Status status = check_supported(params); !status.ok()) return status;
  int multiprocessors = 0;
  if (Status s = count_multiprocessors(&multiprocessors); !s.ok()) return s;
  const sparse::KernelArgs args{.main = make_source(params.main),
                                .extra = make_source(params.extra),
                                .q = static_cast<const uint8_t*>(params.q),
                                .attn_sink = params.attn_sink,
                                .kv_scale = params.kv_scale,
                                .cuts = params.cuts,
                                .out = params.out,
                                .lse = params.lse,
                                .out_accum = params.out_accum,
                                .lse_accum = params.lse_accum,
                                .queries = params.b * params.s_q,
                                .h_q = params.h_q,
                                .scale_log2 = params.sm_scale * 1.4426950408889634f};
  const int rows = narrow_rows(params, multiprocessors);
  Status status = is_narrow(params, rows)
                      ? sparse::narrow::launch_v32(args, rows, params.num_parts, stream)
                      : sparse::wide::launch(params, args, multiprocessors, stream);
  if (!status.ok()) return status;
  return run_merge(merge_params(params), /*shares_sm=*/false, stream);
}

}  // namespace flashmla::sm90
