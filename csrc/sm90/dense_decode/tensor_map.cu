#include "sm90/dense_decode/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <string>

#include "sm90/dense_decode/config.h"

namespace flashmla::sm90::dense_decode {
namespace {

// The driver's encoder, reached through the runtime: this library does not link libcuda.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

constexpr cuuint64_t kElementBytes = 2, kChunkColumns = 64;
constexpr cuuint64_t kChunkStride = kChunkColumns * kElementBytes,
                     kRowBytes = kHeadDim * kElementBytes;

// strides: in bytes, of all extents but the first.
Status encode(const void* base, DType dtype, const cuuint64_t (&extents)[5],
              const cuuint64_t (&strides)[4], const cuuint32_t (&box)[5], CUtensorMap* map) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = find_encoder();
  if (encoder == nullptr) {
    return Status::FailedPrecondition("the CUDA driver has no cuTensorMapEncodeTiled");
  }
  const cuuint32_t element_strides[5] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encoder(map, type, 5, const_cast<void*>(base), extents, strides, box, element_strides,
              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
              CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::Ok();
  return Status::Internal("cuTensorMapEncodeTiled failed with driver error " +
                          std::to_string(static_cast<int>(result)));
}

}  // namespace

Status make_cache_map(const DenseDecodeParams& params, int rows, int chunks, CUtensorMap* map) {
  const cuuint64_t token_bytes = params.h_kv * kRowBytes;
  const cuuint64_t block_size = params.block_size;
  return encode(params.blocks, params.dtype,
                {kChunkColumns, kTokenGroup, cuuint64_t(params.h_kv) * kChunks,
                 block_size / kTokenGroup, cuuint64_t(params.num_blocks)},
                {token_bytes, kChunkStride, kTokenGroup * token_bytes, block_size * token_bytes},
                {kChunkColumns, kTokenGroup, cuuint32_t(chunks), cuuint32_t(rows / kTokenGroup), 1},
                map);
}

Status make_query_map(const DenseDecodeParams& params, int rows, int chunks, CUtensorMap* map) {
  const cuuint64_t all_rows = cuuint64_t(params.b) * params.s_q * params.h_q;
  const cuuint64_t all_bytes = all_rows * kRowBytes;
  return encode(params.q, params.dtype, {kChunkColumns, all_rows, kChunks, 1, 1},
                {kRowBytes, kChunkStride, all_bytes, all_bytes},
                {kChunkColumns, cuuint32_t(rows), cuuint32_t(chunks), 1, 1}, map);
}

}  // namespace flashmla::sm90::dense_decode
