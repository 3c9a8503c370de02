#include "sm90/sparse_decode/wide/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "sm90/host/tensor_map.h"
#include "sm90/sparse_decode/wide/kernels.h"

namespace flashmla::sm90::sparse::wide {
namespace {

Status make_query_map(const SparseDecodeParams& params, int box, CUtensorMap* map) {
  const bool bf16 = params.dtype == DType::kBFloat16;
  const uint64_t rows = uint64_t(params.b) * params.s_q * params.h_q, row_bytes = params.d_qk * 2;
  const uint32_t chunks = params.d_qk / 64;
  return make_tensor_map(
      params.q, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      CU_TENSOR_MAP_SWIZZLE_128B,
      {{64, 2, 64}, {rows, row_bytes, uint32_t(box)}, {chunks, kChunkRowBytes, chunks}}, map);
}

// Whether pairs of head tiles share the conversion of their rows: not where a schedule has so few
// parts that multiprocessors are left, as schedules of small problems do. Their pieces are of one
// tile, for which what two blocks exchange takes longer than it saves.
bool takes_pairs(int64_t head_tiles, int num_parts, int multiprocessors) {
  return head_tiles % 2 == 0 && head_tiles * (num_parts + 1) > multiprocessors;
}

template <typename T>
Status launch_formats(const SparseDecodeParams& params, const KernelArgs& args, bool pairs,
                      cudaStream_t stream) {
  const Format main = params.main.format;
  const Format extra = params.extra.blocks != nullptr ? params.extra.format : main;
  const int parts = params.num_parts;
  if (main == Format::kV41 && extra == Format::kV41Fp4) {
    return launch_kernel<T, V41, V41Fp4>(args, parts, pairs, stream);
  }
  if (main == extra) {
    switch (main) {
      case Format::kV32:
        return launch_kernel<T, V32, V32>(args, parts, pairs, stream);
      case Format::kV32Nope:
        return launch_kernel<T, V32Nope, V32Nope>(args, parts, pairs, stream);
      case Format::kV4:
        return launch_kernel<T, V4, V4>(args, parts, pairs, stream);
      case Format::kV41:
        return launch_kernel<T, V41, V41>(args, parts, pairs, stream);
      case Format::kFp8Row:
        return launch_kernel<T, Fp8Row, Fp8Row>(args, parts, pairs, stream);
      case Format::kDense:
        if (params.d_qk == 576) {
          return launch_kernel<T, Dense<576>, Dense<576>>(args, parts, pairs, stream);
        }
        return launch_kernel<T, Dense<512>, Dense<512>>(args, parts, pairs, stream);
      default:
        break;
    }
  }
  return Status::InvalidArgument(
      "the Hopper sparse_decode kernel takes v32, v32_nope, v4, v41, fp8_row and 16-bit caches, an "
      "extra one of the same format, and v41_fp4 as v41's extra cache");
}

}  // namespace

Status launch(const SparseDecodeParams& params, const sparse::KernelArgs& args, int multiprocessors,
              cudaStream_t stream) {
  KernelArgs wide{.common = args, .query_box = (std::min(params.h_q, kRows) + 7) / 8 * 8};
  if (Status s = make_query_map(params, wide.query_box, &wide.query_map); !s.ok()) return s;
  const int64_t tiles = (params.h_q + kRows - 1) / kRows;
  const bool pairs = takes_pairs(tiles, params.num_parts, multiprocessors);
  if (params.dtype == DType::kBFloat16) {
    return launch_formats<__nv_bfloat16>(params, wide, pairs, stream);
  }
  return launch_formats<__half>(params, wide, pairs, stream);
}

}  // namespace flashmla::sm90::sparse::wide
