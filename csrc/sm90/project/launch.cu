#include "sm90/project/launch.h"

#include <algorithm>
#include <cstdint>

#include "chained.h"
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

// How a product is shared out among thread blocks.
struct Shares {
  int splits;  // blocks that share the sum over k
  int rows;    // that a block makes
  int ring;    // bytes
};

// So many blocks share the sum over k as give each multiprocessor one: twice as many with half as
// much each are slower. Many rows' sums take long to exchange, so that of four blocks with all rows
// two have half the rows instead, whose weights then come from L2 a second time.
Shares share_out(const KernelArgs& args, int multiprocessors) {
  const int tiles = args.tiles * args.params.groups;
  const int most = std::min({kMaxSplits, args.steps, multiprocessors / std::max(tiles, 1)});
  int rows = 16, splits = 1;
  while (rows < args.params.rows) rows *= 2;
  while (2 * splits <= most) splits *= 2;
  if (most == 3) splits = 3;
  if (rows == 128 && splits >= 4) rows /= 2, splits /= 2;
  // Not where clusters' blocks need a multiprocessor each, which would leave some of them empty.
  const bool alone = splits == 1 && tiles <= multiprocessors;
  const bool crowded = tiles > 2 * multiprocessors && rows <= 64;
  return {splits, rows, alone ? kLongRing : crowded ? kShortRing : kRing};
}

template <class T, class Element, int kRows>
Status launch_rows(KernelArgs& args, const Shares& shares, bool dependent, cudaStream_t stream) {
  const ProjectParams& params = args.params;
  const int splits = shares.splits, pieces = std::min(kRows, params.rows) * kPieces;
  while (splits << args.share < pieces) ++args.share;
  args.stages = std::min(shares.ring / stage_bytes(kRows), (args.steps + splits - 1) / splits);
  const int sent = splits == 1 ? 0 : (splits << args.share) * 16;
  const size_t shared_bytes = std::max(args.stages * stage_bytes(kRows), sums_bytes(kRows) + sent);
  const unsigned row_blocks = (params.rows + kRows - 1) / kRows;
  const int turned = kTurnedPairs * kThreads * splits * row_blocks;
  args.turning = (params.rows * params.rope / 2 + turned - 1) / turned;
  const unsigned clusters = args.tiles + args.turning;
  LaunchOptions options{dim3(clusters * splits, params.groups, row_blocks), kThreads, shared_bytes};
  options.cluster = splits;
  options.dependent = dependent;
  const auto kernel = params.transposed ? project_kernel<T, Element, kRows, true>
                                        : project_kernel<T, Element, kRows, false>;
  return launch(kernel, options, stream, "project", args);
}

template <class T, class Element>
Status launch_typed(const ProjectParams& params, bool dependent, cudaStream_t stream) {
  int multiprocessors = 0;
  if (Status status = count_multiprocessors(&multiprocessors); !status.ok()) return status;
  KernelArgs args = {};
  args.params = params;
  args.steps = (params.k + kDepth - 1) / kDepth;
  const int64_t k = params.k, columns = k + params.rope;
  for (int i = 0; i < kMaxWeights; ++i) {
    const int64_t n = params.n_of[i];
    args.tiles += args.tiles_of[i] = (params.n_of[i] + kColumns - 1) / kColumns;
    if (n == 0) continue;
    const Array w =
        params.transposed ? Array{params.w[i], k, n, k, k * n} : Array{params.w[i], n, k, n, k * n};
    if (Status status = make_map(params, w, 64, 64, &args.w_map[i]); !status.ok()) return status;
  }
  const Shares shares = share_out(args, multiprocessors);
  const Array x = {params.x, k, params.rows, params.groups * columns, columns};
  if (Status status = make_map(params, x, kDepth, shares.rows, &args.x_map); !status.ok()) {
    return status;
  }
  switch (shares.rows) {
    case 16:
      return launch_rows<T, Element, 16>(args, shares, dependent, stream);
    case 32:
      return launch_rows<T, Element, 32>(args, shares, dependent, stream);
    case 64:
      return launch_rows<T, Element, 64>(args, shares, dependent, stream);
    default:
      return launch_rows<T, Element, 128>(args, shares, dependent, stream);
  }
}

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
  if (params.exact_n % 4 != 0 || (params.exact_n > 0 && params.k % 4 != 0)) {
    return Status::InvalidArgument(
        "project: the sm90 kernel takes exact_w of k and exact_n that are "
        "multiples of 4, got " +
        std::to_string(params.k) + " and " + std::to_string(params.exact_n));
  }
  const Status status = project::launch_products(params, dependent, stream);
  if (!status.ok() || params.exact_n == 0) return status;
  return project::exact::launch_exact(params, stream);
}

Status run_project(const ProjectParams& params, cudaStream_t stream) {
  return run_project(params, stream, follows_in_chain);
}

}  // namespace flashmla::sm90
