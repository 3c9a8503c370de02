// Tensor maps: what TMA needs to know of an array in global memory.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <initializer_list>

#include "status.h"

namespace flashmla::sm90 {

struct TensorDim {
  uint64_t extent;        // elements
  uint64_t stride_bytes;  // from one element to the next; a multiple of 16 but in the first one
  uint32_t box;           // elements that a load takes
};

// dims: 1 to 5, the contiguous one first. What is out of bounds reads as zeros. InvalidArgument for
// strides that TMA cannot take.
Status make_tensor_map(const void* base, CUtensorMapDataType type, CUtensorMapSwizzle swizzle,
                       std::initializer_list<TensorDim> dims, CUtensorMap* map);

}  // namespace flashmla::sm90
