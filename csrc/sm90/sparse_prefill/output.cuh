// The output of a value warpgroup: 64 heads by 256 of the 512 value columns.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/sparse_prefill/shared_storage.cuh"

namespace flashmla::sm90::sparse_prefill {

// The head, of the block's, in o's row r of this thread.
__device__ __forceinline__ int output_row(int r) {
  const int thread = reread_thread() % kWarpgroupThreads;
  return thread / 32 * 16 + thread % 32 / 4 + 8 * r;
}

// The first of this warpgroup's columns of a result row.
template <typename T>
__device__ __forceinline__ T* output_columns(const KernelArgs& args, int query, int row) {
  const int half = reread_thread() / kWarpgroupThreads - 1;
  return static_cast<T*>(args.out) + uint64_t{result_row(args, query, row)} * kValueDim +
         half * (kValueDim / 2);
}

// One of the two steps in which the four lanes of a quad transpose 4x4 words: lane i's v[j] becomes
// lane j's v[i]. kStep: 1, then 2.
template <int kStep>
__device__ __forceinline__ void transpose_step(uint32_t (&v)[4]) {
  const bool second = threadIdx.x & kStep;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = kStep == 1 ? 2 * i : i;
    const uint32_t other = __shfl_xor_sync(~0u, second ? v[j] : v[j + kStep], kStep);
    if (second)
      v[j] = other;
    else
      v[j + kStep] = other;
  }
}

// Writes the normalised rows in 16 bit. A lane holds two neighbours of each 8 columns; quads
// exchange them so that a lane stores 8 at once. All rows go through each step together: packed
// they leave registers for that, and the next step waits for nothing.
template <typename T>
__device__ __forceinline__ void store_output(const KernelArgs& args, const float (&o)[128],
                                             int query, const float (&out_factor)[kTileRows]) {
  uint32_t v[2][8][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float factor = out_factor[output_row(r)];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      v[r][i / 4][i % 4] = pack<T>(o[4 * i + 2 * r] * factor, o[4 * i + 2 * r + 1] * factor);
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) transpose_step<1>(v[i / 8][i % 8]);
#pragma unroll
  for (int i = 0; i < 16; ++i) transpose_step<2>(v[i / 8][i % 8]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = output_row(r);
    if (row >= count_heads(args)) break;
    auto* target = reinterpret_cast<uint4*>(output_columns<T>(args, query, row));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      target[i * 4 + threadIdx.x % 4] = uint4{v[r][i][0], v[r][i][1], v[r][i][2], v[r][i][3]};
    }
  }
}

// Has the normalised rows stored by TMA, through this warp's 8 KB of a slot that nobody uses: the
// warp computes on meanwhile. All of its sixteen rows are the block's.
template <typename T>
__device__ __forceinline__ void store_through(const KernelArgs& args, SharedStorage& smem, int slot,
                                              const float (&o)[128], int query,
                                              const float (&out_factor)[kTileRows]) {
  // Not read again: one register too many would be live.
  const int thread = threadIdx.x, lane = thread % 32, half = thread / kWarpgroupThreads - 1;
  const int first_row = thread % kWarpgroupThreads / 32 * 16;
  const uint32_t staged =
      smem_address(smem.latent[slot][half]) + first_row * (kHalfChunks * kChunkRowBytes);
  const float factor[2] = {out_factor[first_row + lane / 4], out_factor[first_row + lane / 4 + 8]};
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // row j % 2, columns 16 k + 8 (j / 2) and the next
      packed[j] = pack<T>(o[8 * k + 2 * j] * factor[j % 2], o[8 * k + 2 * j + 1] * factor[j % 2]);
    }
    store_matrix_x4(
        staged + k / 4 * (16 * kChunkRowBytes) + swizzled_offset(lane & 15, k % 4 * 2 + lane / 16),
        packed[0], packed[1], packed[2], packed[3]);
  }
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) {
    tma_store_3d(&args.out_map, staged, 0, result_row(args, query, first_row), half * kHalfChunks);
    commit_stores();
  }
  __syncwarp();
}

template <typename T>
__device__ __forceinline__ void store_zeros(const KernelArgs& args, int query) {
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    const int row = output_row(r);
    if (row >= count_heads(args)) break;
    auto* target = reinterpret_cast<uint4*>(output_columns<T>(args, query, row));
#pragma unroll 1
    for (int i = 0; i < 8; ++i) target[i * 4 + threadIdx.x % 4] = uint4{};
  }
}

}  // namespace flashmla::sm90::sparse_prefill
