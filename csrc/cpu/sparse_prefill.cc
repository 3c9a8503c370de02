#include "cpu/sparse_prefill.h"

#include "cpu/sparse_decode.h"
#include "params/sparse_decode.h"

namespace flashmla::cpu {

// Rows end to end are a cache with one row a block.
Status run_sparse_prefill(const SparsePrefillParams& params, const ParallelFor& parallel_for) {
  SparseDecodeParams decode{};
  decode.b = 1;
  decode.s_q = params.s_q;
  decode.h_q = params.h_q;
  decode.d_qk = params.d_qk;
  decode.d_v = params.d_v;
  decode.dtype = params.dtype;
  decode.sm_scale = params.sm_scale;
  decode.main = {.format = Format::kDense,
                 .num_blocks = params.s_kv,
                 .block_bytes = int64_t{params.d_qk} * itemsize(params.dtype),
                 .row_stride = params.d_qk,
                 .block_size = 1,
                 .topk = params.topk,
                 .layer_blocks = params.s_kv,
                 .first_block = nullptr,
                 .blocks = params.kv,
                 .indices = params.indices,
                 .topk_length = params.topk_length};
  decode.q = params.q;
  decode.attn_sink = params.attn_sink;
  decode.out = params.out;
  decode.lse = params.lse;
  return attend_sparsely(decode, params.max_logits, parallel_for);
}

}  // namespace flashmla::cpu
