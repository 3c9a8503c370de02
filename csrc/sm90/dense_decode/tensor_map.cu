#include "sm90/dense_decode/tensor_map.h"

#include "sm90/dense_decode/config.h"
#include "sm90/host/tensor_map.h"

namespace flashmla::sm90::dense_decode {
namespace {

constexpr uint64_t kElementBytes = 2, kColumns = 64;  // of a chunk
constexpr uint64_t kChunkStride = kColumns * kElementBytes;

CUtensorMapDataType type_of(DType dtype) {
  return dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

}  // namespace

Status make_cache_map(const DenseDecodeParams& params, int rows, int chunks, CUtensorMap* map) {
  const uint64_t token_bytes = params.h_kv * params.row_stride * kElementBytes;
  const uint64_t block_size = params.block_size;
  // Of one KV head's padding nothing is read; with several, the next head lies behind it.
  const uint64_t all_chunks = (params.h_kv - 1) * head_chunks(params) + kChunks;
  return make_tensor_map(params.blocks, type_of(params.dtype), CU_TENSOR_MAP_SWIZZLE_128B,
                         {{kColumns, kElementBytes, kColumns},
                          {kTokenGroup, token_bytes, kTokenGroup},
                          {all_chunks, kChunkStride, static_cast<uint32_t>(chunks)},
                          {block_size / kTokenGroup, kTokenGroup * token_bytes,
                           static_cast<uint32_t>(rows / kTokenGroup)},
                          {static_cast<uint64_t>(params.num_blocks), block_size * token_bytes, 1}},
                         map);
}

Status make_query_map(const DenseDecodeParams& params, int rows, int chunks, CUtensorMap* map) {
  constexpr uint64_t kRowBytes = kHeadDim * kElementBytes;
  const uint64_t all_rows = uint64_t(params.b) * params.s_q * params.h_q;
  return make_tensor_map(params.q, type_of(params.dtype), CU_TENSOR_MAP_SWIZZLE_128B,
                         {{kColumns, kElementBytes, kColumns},
                          {all_rows, kRowBytes, static_cast<uint32_t>(rows)},
                          {kChunks, kChunkStride, static_cast<uint32_t>(chunks)},
                          {1, all_rows * kRowBytes, 1},
                          {1, all_rows * kRowBytes, 1}},
                         map);
}

}  // namespace flashmla::sm90::dense_decode
