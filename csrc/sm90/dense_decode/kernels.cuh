// Which kernel runs: the wide one for row tiles of up to 64, the narrow one for up to 16 or 32.
#pragma once

#include "sm90/dense_decode/kernel_decl.h"
#include "sm90/dense_decode/narrow/kernel.cuh"
#include "sm90/dense_decode/wide/kernel.cuh"

namespace flashmla::sm90::dense_decode {

template <typename T, int kBoxes, bool kGiven>
Status launch_rows(const KernelArgs& args, int tile_rows, dim3 grid, cudaStream_t stream) {
  if (tile_rows <= kLeastRows) {
    return narrow::launch_kernel<T, kLeastRows, kBoxes, kGiven>(args, grid, stream);
  }
  if (tile_rows <= kNarrowRows) {
    return narrow::launch_kernel<T, kNarrowRows, kBoxes, kGiven>(args, grid, stream);
  }
  return wide::launch_kernel<T, kBoxes, kGiven>(args, grid, stream);
}

template <typename T, bool kGiven>
Status launch_variant(const KernelArgs& args, Variant variant, dim3 grid, cudaStream_t stream) {
  switch (variant.boxes) {
    case 1:
      return launch_rows<T, 1, kGiven>(args, variant.tile_rows, grid, stream);
    case 2:
      return launch_rows<T, 2, kGiven>(args, variant.tile_rows, grid, stream);
    default:
      return launch_rows<T, kMaxBoxes, kGiven>(args, variant.tile_rows, grid, stream);
  }
}

}  // namespace flashmla::sm90::dense_decode
