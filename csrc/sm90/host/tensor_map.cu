#include "sm90/host/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <string>

namespace flashmla::sm90 {
namespace {

constexpr int kMaxRank = 5;

// The driver's encoder, reached through the runtime: this library does not link libcuda.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

Status make_tensor_map(const void* base, CUtensorMapDataType type, CUtensorMapSwizzle swizzle,
                       std::initializer_list<TensorDim> dims, CUtensorMap* map) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = find_encoder();
  if (encoder == nullptr) {
    return Status::FailedPrecondition("the CUDA driver has no cuTensorMapEncodeTiled");
  }
  if (dims.size() < 1 || dims.size() > kMaxRank) {
    return Status::Internal("a tensor map has 1 to 5 dimensions, got " +
                            std::to_string(dims.size()));
  }
  cuuint64_t extents[kMaxRank], strides[kMaxRank];
  cuuint32_t box[kMaxRank], element_strides[kMaxRank];
  int rank = 0;
  for (const TensorDim& dim : dims) {
    extents[rank] = dim.extent;
    box[rank] = dim.box;
    element_strides[rank] = 1;
    if (rank > 0) {
      if (dim.stride_bytes % 16 != 0) {
        return Status::InvalidArgument("TMA needs strides of a multiple of 16 bytes, got " +
                                       std::to_string(dim.stride_bytes));
      }
      strides[rank - 1] = dim.stride_bytes;  // the first one's is its element's size
    }
    ++rank;
  }
  const CUresult result =
      encoder(map, type, rank, const_cast<void*>(base), extents, strides, box, element_strides,
              CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::Ok();
  return Status::Internal("cuTensorMapEncodeTiled failed with driver error " +
                          std::to_string(static_cast<int>(result)));
}

}  // namespace flashmla::sm90
