#include "sm90/project/launch.h"

#include <algorithm>
#include <cstdint>

#include "sm90/host/launch.h"
#include "sm90/host/tensor_map.h"
#include "sm90/project/config.h"
#include "sm90/project/exact/launch.h"
#include "sm90/project/few/launch.h"
#include "sm90/project/kernel.cuh"

namespace flashmla::sm90 {
namespace project {
namespace {

constexpr uint64_t kElementBytes = 2;

// An array [outer, groups, inner] or, with groups outermost, [groups, outer, inner].
struct Array {
  const void* data;
  int64_t inner, outer, outer_stride, group_stride;  // elements
};

Status make_map(const ProjectParams& params, const Array& array, int inner_box, int outer_box,
                CUtensorMap* map) {
  const auto type = params.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                     : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto bytes = [](int64_t elements) {
    return static_cast<uint64_t>(elements) * kElementBytes;
  };
  return make_tensor_map(
      array.data, type, CU_TENSOR_MAP_SWIZZLE_128B,
      {{static_cast<uint64_t>(array.inner), kElementBytes, static_cast<uint32_t>(inner_box)},
       {static_cast<uint64_t>(array.outer), bytes(array.outer_stride),
        static_cast<uint32_t>(outer_box)},
       {static_cast<uint64_t>(params.groups), bytes(array.group_stride), 1},
       {1, bytes(array.group_stride), 1}},
      map);
}

// So many blocks share the sum over k that the device's multiprocessors have one or two each. Rows
// play no part, so that equal rows give equal bits in any batch.
int splits_of(int tiles, int steps, int multiprocessors) {
  int splits = 1;
  while (2 * splits <= std::min(kMaxSplits, steps) && 8 * splits * tiles <= 7 * multiprocessors) {
    splits *= 2;
  }
  return splits;
}

template <class T, class Element, int kRows>
Status launch_rows(KernelArgs& args, bool dependent, cudaStream_t stream) {
  int multiprocessors = 0;
  if (Status status = count_multiprocessors(&multiprocessors); !status.ok()) return status;
  const ProjectParams& params = args.params;
  const int splits = splits_of(args.tiles * params.groups, args.steps, multiprocessors);
  const int pieces = params.rows * kPieces;
  while (splits << args.share < pieces) ++args.share;
  args.stages = std::min(most_stages(kRows), (args.steps + splits - 1) / splits);
  const int sent = splits == 1 ? 0 : (splits << args.share) * 16;
  const size_t shared_bytes = std::max(args.stages * stage_bytes(kRows), sums_bytes(kRows) + sent);
  const int turned = kTurnedPairs * kThreads * splits, pairs = params.rows * params.rope / 2;
  args.turning = (pairs + turned - 1) / turned;
  const unsigned clusters = args.tiles + args.turning;
  LaunchOptions options{dim3(clusters * splits, params.groups), kThreads, shared_bytes};
  options.cluster = splits;
  options.dependent = dependent;
  const auto kernel = params.transposed ? project_kernel<T, Element, kRows, true>
                                        : project_kernel<T, Element, kRows, false>;
  return launch(kernel, options, stream, "project", args);
}

template <class T, class Element>
Status launch_typed(const ProjectParams& params, bool dependent, cudaStream_t stream) {
  KernelArgs args = {};
  args.params = params;
  args.steps = (params.k + kDepth - 1) / kDepth;
  const int rows = params.rows <= 16 ? 16 : params.rows <= 32 ? 32 : params.rows <= 64 ? 64 : 128;
  const int64_t k = params.k, columns = k + params.rope;
  const Array x = {params.x, k, params.rows, params.groups * columns, columns};
  if (Status status = make_map(params, x, kDepth, rows, &args.x_map); !status.ok()) return status;
  for (int i = 0; i < kMaxWeights; ++i) {
    const int64_t n = params.n_of[i];
    args.tiles += args.tiles_of[i] = (params.n_of[i] + kColumns - 1) / kColumns;
    if (n == 0) continue;
    const Array w =
        params.transposed ? Array{params.w[i], k, n, k, k * n} : Array{params.w[i], n, k, n, k * n};
    if (Status status = make_map(params, w, 64, 64, &args.w_map[i]); !status.ok()) return status;
  }
  switch (rows) {
    case 16:
      return launch_rows<T, Element, 16>(args, dependent, stream);
    case 32:
      return launch_rows<T, Element, 32>(args, dependent, stream);
    case 64:
      return launch_rows<T, Element, 64>(args, dependent, stream);
    default:
      return launch_rows<T, Element, 128>(args, dependent, stream);
  }
}

}  // namespace
}  // namespace project

namespace project {
namespace {

Status launch_products(const ProjectParams& params, bool dependent, cudaStream_t stream) {
  if (few::takes(params)) return few::launch_few(params, dependent, stream);
  if (params.dtype == DType::kBFloat16) {
    return launch_typed<__nv_bfloat16, BFloat16>(params, dependent, stream);
  }
  return launch_typed<__half, Float16>(params, dependent, stream);
}

}  // namespace
}  // namespace project

Status run_project(const ProjectParams& params, cudaStream_t stream, bool dependent) {
  if (Status status = require_hopper(); !status.ok()) return status;
  if (params.rows > project::kMaxRows || params.dtype == DType::kFloat32) {
    return Status::InvalidArgument("project: the sm90 kernel takes 16 bits and at most " +
                                   std::to_string(project::kMaxRows) + " rows");
  }
  const Status status = project::launch_products(params, dependent, stream);
  if (!status.ok() || params.exact_n == 0) return status;
  return project::exact::launch_exact(params, stream);
}

Status run_project(const ProjectParams& params, cudaStream_t stream) {
  return run_project(params, stream, false);
}

}  // namespace flashmla::sm90
