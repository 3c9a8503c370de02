// Loads into the ring by the value warps: a tile's rows, wherever they lie, by cp.async; a query
// token's heads by TMA.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/copy_async.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/sparse_prefill/shared_storage.cuh"

namespace flashmla::sm90::sparse_prefill {

// The loads of a block in order, as one value warp sees them: of each query token that has tiles
// its heads, then the tiles, of which the warp gathers one group of eight tokens.
//
// A lane copies 16 bytes of each chunk of two tokens. Products wait for what the warp does between
// them, so its place is kept in registers, and indices are fetched a tile ahead.
template <int kHeadDim>
class LoadStream {
 public:
  __device__ __forceinline__ explicit LoadStream(const KernelArgs& args) {
    query_ = blockIdx.y - args.query_stride;
    enter_next(args);
  }

  // Finds the rows of the next load.
  __device__ __forceinline__ void prepare(int thread) {
    asm volatile("" : "+r"(row_));  // not before: it may still be on its way
    const int lane = thread % 32;
#pragma unroll
    for (int j = 0; j < 2; ++j) source_row_[j] = __shfl_sync(~0u, row_, lane / 8 + 4 * j);
  }

  // Begins the load that was prepared, into a slot that nobody uses any more, and goes on to the
  // next.
  __device__ __forceinline__ void load(const KernelArgs& args, SharedStorage& smem, int slot,
                                       int thread) {
    if (query_ >= args.s_q) return;
    if (tile_ < 0)
      load_heads(args, smem, slot, thread);
    else
      load_tile(args, smem, slot, thread);
    if (++tile_ * kTileTokens >= length_) enter_next(args);
    const int token = (thread / 32 - kWarpgroupWarps) * kTokenGroup + thread % kTokenGroup;
    const int i = tile_ * kTileTokens + token;
    row_ = -1;
    if (tile_ >= 0 && i < length_) row_ = __ldg(args.indices + int64_t{query_} * args.topk + i);
  }

 private:
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr bool kRope = kHeadDim > kValueDim;

  int query_, tile_;        // the next load; tile -1: the heads; query s_q or more: none
  int length_;              // indices of the query token that count
  int row_;                 // of that token of the next tile; -1: none
  uint32_t source_row_[2];  // that this lane copies from

  __device__ __forceinline__ void enter_next(const KernelArgs& args) {
    length_ = 0;
    for (query_ += args.query_stride; query_ < args.s_q; query_ += args.query_stride) {
      length_ = args.length_of(query_);
      if (length_ > 0) break;
    }
    tile_ = -1;
  }

  __device__ __forceinline__ void load_heads(const KernelArgs& args, SharedStorage& smem, int slot,
                                             int thread) const {
    const uint32_t full = smem_address(&smem.full[slot]);
    if (thread == kLoadingThread) {
      fence_async_proxy();  // the slot held what cp.async and stmatrix wrote
      const int first_row = query_ * args.h_q + first_head();
      const uint32_t target = smem_address(smem.latent[slot]);
      mbarrier_expect(full, args.query_box * kChunkRowBytes * (kLatentChunks + kRope));
      tma_load_3d(target, &args.query_half_map, full, 0, first_row, 0);
      tma_load_3d(target + kHalfBytes, &args.query_half_map, full, 0, first_row, kHalfChunks);
      if constexpr (kRope) {
        tma_load_3d(smem_address(smem.rope[slot]), &args.query_rope_map, full, 0, first_row,
                    kLatentChunks);
      }
    }
    __syncwarp();
    if (thread % 32 == 0) mbarrier_arrive(full);
    mbarrier_arrive(full);
  }

  // Where the lane's other token lies: the swizzle has another bit there.
  static __device__ __forceinline__ uint32_t skip_four(uint32_t target, int j) {
    return (target ^ j * 64) + j * 4 * kChunkRowBytes;
  }

  __device__ __forceinline__ void load_tile(const KernelArgs& args, SharedStorage& smem, int slot,
                                            int thread) const {
    const int group = thread / 32 - kWarpgroupWarps;
    const uint32_t full = smem_address(&smem.full[slot]);
    const uint32_t offset = swizzled_offset(thread % 32 / 8, thread % 8);
    const uint32_t latent = smem_address(smem.latent[slot]) + group * kTokenGroupBytes + offset;
    const uint32_t rope = smem_address(smem.rope[slot]) + group * kGroupBytes + offset;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const bool valid = source_row_[j] < args.s_kv;
      const uint8_t* source =
          args.kv + uint64_t{valid ? source_row_[j] : 0} * kRowBytes + thread % 8 * 16;
      const uint32_t target = skip_four(latent, j);
#pragma unroll
      for (int c = 0; c < kLatentChunks; ++c) {
        copy_16_or_zero(target + c / kHalfChunks * kHalfBytes + c % kHalfChunks * kGroupBytes,
                        source + c * kChunkRowBytes, valid);
      }
      if constexpr (kRope) {
        copy_16_or_zero(skip_four(rope, j), source + kLatentChunks * kChunkRowBytes, valid);
      }
    }
    const uint32_t attended = __ballot_sync(~0u, static_cast<uint32_t>(row_) < args.s_kv);
    if (thread % 32 == 0) {
      smem.attended[slot][group] = attended;
      mbarrier_arrive(full);
    }
    mbarrier_arrive_after_copies(full);
  }
};

}  // namespace flashmla::sm90::sparse_prefill
