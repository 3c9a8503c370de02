// Loads into the ring by the value warps: a tile's rows, wherever they lie, by cp.async; a query
// token's heads by TMA.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/copy_async.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/sparse_prefill/shared_storage.cuh"

namespace flashmla::sm90::sparse_prefill {

// threadIdx.x, read where it stands: what is derived from it is not computed early and kept.
__device__ __forceinline__ int reread_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// This warp of the two value warpgroups'.
__device__ __forceinline__ int gather_warp() { return reread_thread() / 32 - kWarpgroupWarps; }

// The loads of a block in order, as one value warp sees them: of each query token that has tiles
// its heads, then the tiles, of which the warp gathers one group of tokens.
template <int kHeadDim>
struct LoadStream {
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr bool kRope = kHeadDim > kValueDim;

  int32_t row;  // this lane's (of eight) of the next tile; -1: none

  __device__ __forceinline__ void start(const KernelArgs& args, SharedStorage& smem) {
    LoadState state{.query = static_cast<int>(blockIdx.y) - static_cast<int>(gridDim.y)};
    enter_next(args, state);
    save(smem, state);
  }

  // Begins the next load, into a slot that nobody uses any more.
  __device__ __forceinline__ void load_next(const KernelArgs& args, SharedStorage& smem, int slot) {
    LoadState state = smem.load_state[gather_warp()];
    if (state.query >= args.s_q) return;
    if (state.tile < 0)
      load_heads(args, smem, state.query, slot);
    else
      load_tile(args, smem, slot);
    if (++state.tile * kTileTokens >= state.length)
      enter_next(args, state);
    else
      fetch(args, state);
    save(smem, state);
  }

 private:
  static __device__ __forceinline__ void save(SharedStorage& smem, const LoadState& state) {
    __syncwarp();
    if (reread_thread() % 32 == 0) smem.load_state[gather_warp()] = state;
    __syncwarp();
  }

  static __device__ __forceinline__ void enter_next(const KernelArgs& args, LoadState& state) {
    state.tile = -1;
    state.length = 0;
    for (state.query += gridDim.y; state.query < args.s_q; state.query += gridDim.y) {
      state.length = args.length_of(state.query);
      if (state.length > 0) break;
    }
  }

  __device__ __forceinline__ void fetch(const KernelArgs& args, const LoadState& state) {
    const int i =
        state.tile * kTileTokens + gather_warp() * kTokenGroup + reread_thread() % kTokenGroup;
    row = i < state.length ? __ldg(args.indices + int64_t{state.query} * args.topk + i) : -1;
  }

  __device__ __forceinline__ void load_heads(const KernelArgs& args, SharedStorage& smem, int query,
                                             int slot) const {
    const uint32_t full = smem_address(&smem.full[slot]);
    if (gather_warp() == 0 && reread_thread() % 32 == 0) {
      fence_async_proxy();  // the slot held what cp.async and stmatrix wrote
      const int first_row = query * args.h_q + first_head();
      const uint32_t target = smem_address(smem.latent[slot]);
      mbarrier_arrive_expect(full, args.query_box * kChunkRowBytes * (kRope ? 9 : 8));
      tma_load_3d(target, &args.query_half_map, full, 0, first_row, 0);
      tma_load_3d(target + kHalfBytes, &args.query_half_map, full, 0, first_row, kHalfChunks);
      if constexpr (kRope) {
        tma_load_3d(smem_address(smem.rope[slot]), &args.query_rope_map, full, 0, first_row,
                    kLatentChunks);
      }
    } else if (reread_thread() % 32 == 0) {
      mbarrier_arrive(full);
    }
    __syncwarp();
    mbarrier_arrive(full);
  }

  __device__ __forceinline__ void load_tile(const KernelArgs& args, SharedStorage& smem,
                                            int slot) const {
    const int lane = reread_thread() % 32, group = gather_warp(), piece = lane % 8;
    const uint32_t full = smem_address(&smem.full[slot]);
    const bool attended = static_cast<uint32_t>(row) < args.s_kv;
    const uint32_t all = __ballot_sync(~0u, attended);
    if (lane == 0) {
      smem.attended[slot][group] = all;
      mbarrier_arrive(full);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int token = j * 4 + lane / 8;  // of the group
      const bool valid = all >> token & 1;
      const int32_t of_token = __shfl_sync(~0u, row, token);
      const uint8_t* source = args.kv + int64_t{valid ? of_token : 0} * kRowBytes + piece * 16;
      const uint32_t offset = swizzled_offset(token, piece);
      const uint32_t target = smem_address(smem.latent[slot]) + group * kTokenGroupBytes + offset;
#pragma unroll
      for (int c = 0; c < kLatentChunks; ++c) {
        copy_16_or_zero(target + c / kHalfChunks * kHalfBytes + c % kHalfChunks * kGroupBytes,
                        source + c * kChunkRowBytes, valid);
      }
      if constexpr (kRope) {
        copy_16_or_zero(smem_address(smem.rope[slot]) + group * kGroupBytes + offset,
                        source + kLatentChunks * kChunkRowBytes, valid);
      }
    }
    mbarrier_arrive_after_copies(full);
  }
};

}  // namespace flashmla::sm90::sparse_prefill
