#include "sm90/project/launch.h"

#include <algorithm>
#include <cstdint>

#include "sm90/host/launch.h"
#include "sm90/host/tensor_map.h"
#include "sm90/project/config.h"
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

int count_tiles(const ProjectParams& params, int columns) {
  int tiles = 0;
  for (const int n : params.n_of) tiles += (n + columns - 1) / columns;
  return tiles;
}

// So many blocks share the sum over k that the device's multiprocessors have two each.
int splits_of(const KernelArgs& args, int multiprocessors) {
  const int tiles = args.tiles * args.params.groups;
  return std::clamp(2 * multiprocessors / tiles, 1, std::min(kMaxSplits, args.steps));
}

template <class T, class Element, int kRows, int kParts>
Status launch_tiles(KernelArgs& args, int multiprocessors, bool dependent, cudaStream_t stream) {
  const ProjectParams& params = args.params;
  for (int i = 0; i < kMaxWeights; ++i) {
    args.tiles_of[i] = (params.n_of[i] + kParts * kPart - 1) / (kParts * kPart);
  }
  args.tiles = count_tiles(params, kParts * kPart);
  const int splits = splits_of(args, multiprocessors);
  args.stages = std::min(stages_of(kRows, kParts), (args.steps + splits - 1) / splits);
  const size_t shared_bytes =
      std::max(args.stages * stage_bytes(kRows, kParts), sums_bytes(kRows, kParts));
  const unsigned tiles = args.tiles + (params.rope > 0 ? 1 : 0);
  LaunchOptions options{dim3(tiles * splits, params.groups), kThreads, shared_bytes};
  options.cluster = splits;
  options.dependent = dependent;
  const auto kernel = params.transposed ? project_kernel<T, Element, kRows, kParts, true>
                                        : project_kernel<T, Element, kRows, kParts, false>;
  return launch(kernel, options, stream, "project", args);
}

// The wider tile where its blocks keep the multiprocessors busy.
template <class T, class Element, int kRows>
Status launch_rows(KernelArgs& args, bool dependent, cudaStream_t stream) {
  int multiprocessors = 0;
  if (Status status = count_multiprocessors(&multiprocessors); !status.ok()) return status;
  const int blocks = count_tiles(args.params, 4 * kPart) * args.params.groups *
                     std::min(kMaxSplits, std::max(1, args.steps / 2));
  if constexpr (kRows < 128) {
    if (blocks >= 3 * multiprocessors / 2) {
      return launch_tiles<T, Element, kRows, 4>(args, multiprocessors, dependent, stream);
    }
  }
  return launch_tiles<T, Element, kRows, 2>(args, multiprocessors, dependent, stream);
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

Status run_project(const ProjectParams& params, cudaStream_t stream, bool dependent) {
  if (Status status = require_hopper(); !status.ok()) return status;
  if (params.rows > project::kMaxRows || params.dtype == DType::kFloat32) {
    return Status::InvalidArgument("project: the sm90 kernel takes 16 bits and at most " +
                                   std::to_string(project::kMaxRows) + " rows");
  }
  if (project::few::takes(params)) return project::few::launch_few(params, dependent, stream);
  if (params.dtype == DType::kBFloat16) {
    return project::launch_typed<__nv_bfloat16, BFloat16>(params, dependent, stream);
  }
  return project::launch_typed<__half, Float16>(params, dependent, stream);
}

Status run_project(const ProjectParams& params, cudaStream_t stream) {
  return run_project(params, stream, false);
}

}  // namespace flashmla::sm90
