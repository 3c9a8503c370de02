#include "sm90/exchange/launch.h"

#include <cstdint>
#include <string>

#include "sm90/exchange/kernel.cuh"
#include "sm90/host/launch.h"

namespace flashmla::sm90 {

Status run_exchange(const ExchangeParams& params, cudaStream_t stream) {
  using namespace exchange;
  Workspace workspace;
  Status status = find_workspace("exchange", params.group, params.device, &workspace);
  if (!status.ok()) return status;
  if (params.size != workspace.size) {
    return Status::InvalidArgument("exchange: out must have a segment of each of " +
                                   std::to_string(workspace.size) + " devices, got " +
                                   std::to_string(params.size));
  }
  int64_t vectors = 0;
  for (int i = 0; i < params.count; ++i) {
    const Exchanged& array = params.arrays[i];
    vectors += array.bytes / kVectorBytes;
    const auto places =
        reinterpret_cast<uintptr_t>(array.x) | reinterpret_cast<uintptr_t>(array.out);
    if (places % kVectorBytes != 0) {
      return Status::InvalidArgument("exchange: arrays must begin at multiples of 16 bytes");
    }
  }
  const int64_t bytes = vectors * kVectorBytes * workspace.size;
  if (bytes > kMaxExchangeBytes) {
    return Status::InvalidArgument("exchange takes at most " + std::to_string(kMaxExchangeBytes) +
                                   " bytes, got " + std::to_string(bytes));
  }
  const Split split = split_segment(vectors);
  auto kernel = workspace.size == 2   ? exchange_kernel<2>
                : workspace.size <= 4 ? exchange_kernel<4>
                                      : exchange_kernel<kMaxPeers>;
  return launch(kernel, {static_cast<unsigned>(split.blocks), kThreads}, stream, "exchange", params,
                workspace, split);
}

}  // namespace flashmla::sm90
