// A value warpgroup: O[64 x 256] = P V for one half of the value columns, and the output.
#pragma once

#include "sm90/attention/softmax.cuh"
#include "sm90/attention/store_rows.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/sparse_decode/wide/work.cuh"

namespace flashmla::sm90::sparse::wide {

// Where a row of the block's heads goes.
struct OutputRows {
  void* rows;
  bool partial;

  template <typename T>
  static __device__ __forceinline__ OutputRows of(const sparse::KernelArgs& args, HeadTile heads,
                                                  const PieceWalk& walk) {
    const int64_t offset = (walk.first_row(args.h_q) + heads.first) * kValueDim;
    if (walk.partial()) return {args.out_accum + offset, true};
    return {static_cast<T*>(args.out) + offset, false};
  }
};

// The head in o's row r of this thread.
__device__ __forceinline__ int output_row(int r) {
  const int thread = reread_thread() % kWarpgroupThreads;
  return thread / 32 * 16 + thread % 32 / 4 + 8 * r;
}

template <typename T>
__device__ __forceinline__ void store_piece(const OutputRows& target, const float (&o)[128],
                                            const float (&inverse_sum)[kRows], int half,
                                            int count) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = output_row(r);
    const bool valid = row < count;
    if (!__any_sync(~0u, valid)) break;
    if (target.partial) {
      store_partial_half_row(static_cast<float*>(target.rows) + row * kValueDim, o, r, half,
                             inverse_sum[row], valid);
    } else {
      store_half_row<T>(static_cast<T*>(target.rows) + row * kValueDim + half * (kValueDim / 2), o,
                        r, inverse_sum[row], valid);
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_zeros(const OutputRows& target, int half, int count) {
#pragma unroll 1
  for (int r = 0; r < 2; ++r) {
    const int row = output_row(r);
    const int64_t bytes = int64_t{row} * kValueDim * (target.partial ? 4 : sizeof(T));
    store_zero_half_row(reinterpret_cast<uint4*>(static_cast<uint8_t*>(target.rows) + bytes),
                        target.partial, half, row < count);
  }
}

// The half of the value columns that this warpgroup has.
__device__ __forceinline__ int value_half() { return reread_thread() / kWarpgroupThreads - 1; }

// This warp has read the quarter of the buffer: tells the block that converts it, or where it is
// the last all blocks.
template <int kBlocks, int kQuarter, int kParts>
__device__ __forceinline__ void release_quarter(uint64_t (&keys_empty)[kParts]) {
  const uint32_t barrier = smem_address(&keys_empty[kQuarter]);
  const int lane = reread_thread() % 32;
  if constexpr (kBlocks == 1) {
    if (lane == 0) mbarrier_arrive(barrier);
  } else if constexpr (kQuarter == kQuarters - 1) {
    if (lane < kBlocks) mbarrier_arrive_cluster(map_shared(barrier, lane));
  } else {
    if (lane == 0) mbarrier_arrive_cluster(map_shared(barrier, kQuarter % kBlocks));
  }
  __syncwarp();
}

// This warp has read half of the columns that it reads of a tile, or all.
__device__ __forceinline__ void release_half(uint64_t& barrier) {
  if (reread_thread() % 32 == 0) mbarrier_arrive(smem_address(&barrier));
  __syncwarp();
}

template <typename T, typename Main, typename Extra, Feed kFeed>
__device__ void run_values(const KernelArgs& kernel_args, SharedStorage<Main, Extra, kFeed>& smem) {
  using Storage = SharedStorage<Main, Extra, kFeed>;
  constexpr int kBlocks = Storage::kBlocks;
  const sparse::KernelArgs& args = kernel_args.common;
  const auto on_empty = [&](const PieceWalk& empty) {
    const HeadTile heads = HeadTile::of_block<kRows>(args);
    store_zeros<T>(OutputRows::of<T>(args, heads, empty), value_half(), heads.count);
  };
  float o[128];
  uint32_t tile = 0;  // of the part
  int pieces = 0;
  PieceWalk walk = PieceWalk::before(smem.begin);

  for (;;) {
    walk.next(args, smem.begin, smem.end, on_empty);
    if (walk.done()) return;
    for (int i = 0; i < walk.tiles; ++i, ++tile) {
      const int buffer = Storage::buffer_of(tile);
      const uint32_t parity = Storage::parity_of(tile);
      mbarrier_wait(smem_address(&smem.probabilities_stored[buffer]), parity);
      const int power0 = smem.rescale[buffer][output_row(0)];
      const int power1 = smem.rescale[buffer][output_row(1)];
      if (i > 0 && __any_sync(~0u, (power0 | power1) != 0)) {
        const float factor0 = sm90::rescale_factor(power0), factor1 = sm90::rescale_factor(power1);
#pragma unroll
        for (int j = 0; j < 128; ++j) o[j] *= (j & 2) ? factor1 : factor0;
      }
      const uint64_t probabilities = k_major_desc(Storage::probabilities_at(buffer));
      const uint64_t values = mn_major_desc(
          Storage::keys_at(buffer, value_half() * (kLatentChunks / 2)), kChunkBytes, kGroupBytes);
      pin_registers(o);
      mbarrier_wait(smem_address(&smem.values_go[buffer]), parity);
      if constexpr (kFeed != Feed::kPeers) fence_async_proxy();
      wgmma_fence();
      auto& empty = smem.keys_empty[buffer];
      if constexpr (Storage::kRing) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int k = 0; k < kTileTokens / 16; ++k) {
            wgmma_ss_mn<T>(reinterpret_cast<float (&)[64]>(o[64 * j]), probabilities + 2 * k,
                           values + kGroupBytes / 8 * k + j * (2 * kChunkBytes / 16),
                           k > 0 || i > 0);
          }
          wgmma_commit();
        }
        wgmma_wait<1>();
        release_half(empty[0]);
        wgmma_wait<0>();
        pin_registers(o);
        release_half(empty[1]);
      } else {
#pragma unroll
        for (int k = 0; k < kTileTokens / 16; ++k) {
          // Two, as the compiler wants more registers at once for one of 256 columns than a thread
          // has at the launch.
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            wgmma_ss_mn<T>(reinterpret_cast<float (&)[64]>(o[64 * j]), probabilities + 2 * k,
                           values + kGroupBytes / 8 * k + j * (2 * kChunkBytes / 16),
                           k > 0 || i > 0);
          }
          wgmma_commit();
        }
        wgmma_wait<3>();
        release_quarter<kBlocks, 0>(empty);
        wgmma_wait<2>();
        release_quarter<kBlocks, 1>(empty);
        wgmma_wait<1>();
        release_quarter<kBlocks, 2>(empty);
        wgmma_wait<0>();
        pin_registers(o);
        release_quarter<kBlocks, 3>(empty);
      }
    }
    const HeadTile heads = HeadTile::of_block<kRows>(args);
    store_piece<T>(OutputRows::of<T>(args, heads, walk), o, smem.inverse_sum[pieces % 3],
                   value_half(), heads.count);
    ++pieces;
  }
}

}  // namespace flashmla::sm90::sparse::wide
