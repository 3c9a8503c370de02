#include "sm90/project/few/launch.h"

#include <algorithm>

#include "sm90/host/launch.h"
#include "sm90/project/few/config.h"
#include "sm90/project/few/kernel.cuh"

namespace flashmla::sm90::project::few {
namespace {

// What shares the sum over k of a tile: so many blocks that the device's multiprocessors have two
// each. Rows play no part, so that equal rows give equal bits in any batch.
struct Shares {
  int splits, warps;
};

Shares share_out(int tiles, int k, int multiprocessors) {
  const int most = k / kDepth, warps = std::min(kMaxWarps, most);
  return {std::clamp(2 * multiprocessors / tiles, 1, std::min(kMaxSplits, most / warps)), warps};
}

template <class T, class Element, bool kTransposed>
Status launch_kernel(const ProjectParams& params, bool dependent, cudaStream_t stream) {
  int multiprocessors = 0;
  if (Status status = count_multiprocessors(&multiprocessors); !status.ok()) return status;
  KernelArgs args = {};
  args.params = params;
  for (int i = 0; i < kMaxWeights; ++i) {
    args.tiles += args.tiles_of[i] = (params.n_of[i] + kColumns - 1) / kColumns;
  }
  const auto [splits, warps] = share_out(args.tiles * params.groups, params.k, multiprocessors);
  args.steps = params.k / Ring<T, kTransposed>::kStepDepth;
  args.block_steps = (args.steps + splits - 1) / splits;
  const int pieces = params.rows * (kColumns / kPiece);
  while (splits << args.share < pieces) ++args.share;
  const unsigned tiles = args.tiles + (params.rope > 0 ? 1 : 0);
  LaunchOptions options{dim3(splits, tiles, params.groups), static_cast<unsigned>(warps) * 32};
  options.shared_bytes =
      size_t{4} * warps * params.rows * kStride + (size_t{16} * splits << args.share);
  options.cluster = splits;
  options.dependent = dependent;
  options.needs_l1 = true;
  return launch(project_few_kernel<T, Element, kTransposed>, options, stream, "project", args);
}

template <class T, class Element>
Status launch_typed(const ProjectParams& params, bool dependent, cudaStream_t stream) {
  return params.transposed ? launch_kernel<T, Element, true>(params, dependent, stream)
                           : launch_kernel<T, Element, false>(params, dependent, stream);
}

}  // namespace

bool takes(const ProjectParams& params) {
  const auto whole = [](int columns) { return columns % 8 == 0; };  // of 16 bytes
  return params.rows <= kMaxRows && params.k > 0 && params.k % kDepth == 0 && whole(params.rope) &&
         std::all_of(params.n_of, params.n_of + kMaxWeights, whole);
}

Status launch_few(const ProjectParams& params, bool dependent, cudaStream_t stream) {
  if (params.dtype == DType::kBFloat16) {
    return launch_typed<__nv_bfloat16, BFloat16>(params, dependent, stream);
  }
  return launch_typed<__half, Float16>(params, dependent, stream);
}

}  // namespace flashmla::sm90::project::few
