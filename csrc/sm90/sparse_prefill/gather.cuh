// Loads into the ring by the value warps: a tile's rows, wherever they lie, by cp.async; a query
// token's heads by TMA.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
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
//
// kPair: two blocks of a cluster with other heads of the same query tokens gather half of a tile's
// tokens each, and send them to each other.
template <int kHeadDim, bool kPair>
struct LoadStream {
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr bool kRope = kHeadDim > kValueDim;

  // Of the next tile; -1: none. Lanes 0-7 have the warp's group of tokens; in pairs lanes 8-11
  // those that it gathers.
  int32_t row;

  __device__ __forceinline__ void start(const KernelArgs& args, SharedStorage& smem) {
    LoadState state{.query = static_cast<int>(blockIdx.y) - static_cast<int>(gridDim.y)};
    enter_next(args, state);
    save(smem, state);
  }

  // Begins the next load, into a slot that nobody uses any more.
  // Begins the next load, into a slot that nobody uses any more. parity: of its round.
  __device__ __forceinline__ void load_next(const KernelArgs& args, SharedStorage& smem, int slot,
                                            uint32_t parity) {
    LoadState state = smem.load_state[gather_warp()];
    if (state.query >= args.s_q) return;
    if (kPair && reread_thread() == kSendingThread) {
      mbarrier_arrive_cluster(map_shared(smem_address(&smem.peer_free[slot]), cluster_rank() ^ 1));
      if (state.tile >= 0) smem.to_send = slot * 2 + parity;
    }
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

  // Sends this block's half of the tile that was loaded last to the peer, if that is still to do.
  static __device__ __forceinline__ void send(SharedStorage& smem) {
    if (!kPair) return;
    if (reread_thread() == kSendingThread) {
      volatile int& to_send = smem.to_send;
      const int pending = to_send;
      if (pending >= 0) {
        const int slot = pending / 2, parity = pending % 2;
        mbarrier_wait(smem_address(&smem.half_full[slot]), parity);
        mbarrier_wait_cluster(smem_address(&smem.peer_free[slot]), parity);
        fence_async_proxy();  // the half was written by cp.async
        const uint32_t rank = cluster_rank(), peer = rank ^ 1;
        const uint32_t full = map_shared(smem_address(&smem.full[slot]), peer);
        const auto copy = [&](uint32_t source, uint32_t bytes) {
          source += rank * bytes;
          copy_bulk_cluster(map_shared(source, peer), source, bytes, full);
        };
        copy(smem_address(smem.latent[slot][0]), kHalfBytes / 2);
        copy(smem_address(smem.latent[slot][1]), kHalfBytes / 2);
        if constexpr (kRope) copy(smem_address(smem.rope[slot]), kChunkBytes / 2);
        to_send = -1;
      }
    }
    __syncwarp();
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
    const int lane = reread_thread() % 32;
    int token = gather_warp() * kTokenGroup + lane % kTokenGroup;
    if (kPair && lane >= 8) token = cluster_rank() * 32 + gather_warp() * 4 + lane % 4;
    const int i = state.tile * kTileTokens + token;
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
    if constexpr (kPair) mbarrier_arrive(smem_address(&smem.half_full[slot]));
  }

  __device__ __forceinline__ void load_tile(const KernelArgs& args, SharedStorage& smem,
                                            int slot) const {
    const int lane = reread_thread() % 32, group = gather_warp(), piece = lane % 8;
    const uint32_t full = smem_address(&smem.full[slot]);
    const bool attended = static_cast<uint32_t>(row) < args.s_kv;
    const uint32_t all = __ballot_sync(~0u, attended);
    if (lane == 0) {
      smem.attended[slot][group] = all;
      if (kPair && group == 0)
        mbarrier_arrive_expect(full, kTileTokens / 2 * kRowBytes);
      else
        mbarrier_arrive(full);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < (kPair ? 1 : 2); ++j) {
      const int own = j * 4 + lane / 8;  // of the tokens that this warp gathers
      const int source_lane = kPair ? 8 + own : own;
      const int target_group = kPair ? cluster_rank() * 4 + group / 2 : group;
      const int token = kPair ? group % 2 * 4 + own : own;  // of its group
      const bool valid = all >> source_lane & 1;
      const int32_t of_token = __shfl_sync(~0u, row, source_lane);
      const uint8_t* source = args.kv + int64_t{valid ? of_token : 0} * kRowBytes + piece * 16;
      const uint32_t offset = swizzled_offset(token, piece);
      const uint32_t target =
          smem_address(smem.latent[slot]) + target_group * kTokenGroupBytes + offset;
#pragma unroll
      for (int c = 0; c < kLatentChunks; ++c) {
        copy_16_or_zero(target + c / kHalfChunks * kHalfBytes + c % kHalfChunks * kGroupBytes,
                        source + c * kChunkRowBytes, valid);
      }
      if constexpr (kRope) {
        copy_16_or_zero(smem_address(smem.rope[slot]) + target_group * kGroupBytes + offset,
                        source + kLatentChunks * kChunkRowBytes, valid);
      }
    }
    if constexpr (kPair) mbarrier_arrive_after_copies(smem_address(&smem.half_full[slot]));
    mbarrier_arrive_after_copies(full);
  }
};

}  // namespace flashmla::sm90::sparse_prefill
