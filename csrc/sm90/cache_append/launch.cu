#include "sm90/cache_append/launch.h"

#include <algorithm>
#include <cstdint>

#include "sm90/host/launch.h"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 128;

__host__ __device__ int64_t token_bytes(const CacheAppendParams& params) {
  return int64_t{params.h_kv} * params.d * (params.rows_dtype == DType::kFloat32 ? 4 : 2);
}

// One block a row at a time; Word is the widest type that divides a row.
template <typename Word>
__global__ void __launch_bounds__(kThreads) cache_append_kernel(CacheAppendParams params) {
  const int words = static_cast<int>(token_bytes(params) / sizeof(Word));
  const int64_t num_rows = int64_t{params.b} * params.s_new;
  for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
    const int sequence = static_cast<int>(row / params.s_new);
    const int step = static_cast<int>(row % params.s_new);
    const int64_t position = int64_t{params.positions[sequence]} + step;
    if (step >= params.num_new[sequence] || position < 0) continue;
    const int64_t entry = position / params.block_size;
    if (entry >= params.max_blocks) continue;
    const int block = params.block_table[int64_t{sequence} * params.max_blocks + entry];
    if (block < 0 || block >= params.num_blocks) continue;
    const Word* source = static_cast<const Word*>(params.rows) + row * words;
    Word* target = static_cast<Word*>(params.updated) +
                   (int64_t{block} * params.block_size + position % params.block_size) * words;
    for (int i = threadIdx.x; i < words; i += kThreads) target[i] = source[i];
  }
}

template <typename Word>
Status launch_append(const CacheAppendParams& params, cudaStream_t stream) {
  const int64_t num_rows = int64_t{params.b} * params.s_new;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(num_rows, 1 << 20));
  return launch(cache_append_kernel<Word>, {grid, kThreads}, stream, "cache_append", params);
}

}  // namespace

Status run_cache_append(const CacheAppendParams& params, cudaStream_t stream) {
  if (params.updated != params.blocks) {
    const int64_t bytes = params.num_blocks * params.block_bytes;
    const cudaError_t error =
        cudaMemcpyAsync(params.updated, params.blocks, bytes, cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return to_status(error, "cache_append");
  }
  const int64_t row_bytes = token_bytes(params);
  if (int64_t{params.b} * params.s_new == 0 || row_bytes == 0) return Status::Ok();
  if (row_bytes % sizeof(uint4) == 0) return launch_append<uint4>(params, stream);
  if (row_bytes % sizeof(uint32_t) == 0) return launch_append<uint32_t>(params, stream);
  return launch_append<uint16_t>(params, stream);
}

}  // namespace flashmla::sm90
