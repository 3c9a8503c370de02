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
// its heads, then the tiles. Of a tile's tokens the warp gathers four of the first half and four of
// the second.
template <int kHeadDim>
struct LoadStream {
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr bool kRope = kHeadDim > kValueDim;

  // Of the next tile; -1: none. Lanes 0-7 have the group of tokens that the warp says of whether
  // they are attended; lanes 8-11 those that it gathers of the first half, lanes 12-15 of the
  // second.
  int32_t row;

  __device__ __forceinline__ void start(const KernelArgs& args, SharedStorage& smem) {
    WarpState state{.query = static_cast<int>(blockIdx.y) - static_cast<int>(gridDim.y),
                    .computed = static_cast<int>(blockIdx.y)};
    enter_next(args, state);
    save(smem, state);
  }

  // Begins the next load where it may begin before the slot is free: half of a tile's latent
  // columns.
  __device__ __forceinline__ void load_half(const KernelArgs& args, SharedStorage& smem, int slot) {
    const volatile WarpState& state = smem.state[gather_warp()];
    if (state.query < args.s_q && state.tile >= 0)
      copy_latent<0, kLatentChunks>(args, smem, slot, 0);
  }

  // Begins the rest, once nobody uses the slot any more.
  __device__ __forceinline__ void load_rest(const KernelArgs& args, SharedStorage& smem, int slot) {
    WarpState state = smem.state[gather_warp()];
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
  static __device__ __forceinline__ void save(SharedStorage& smem, const WarpState& state) {
    __syncwarp();
    if (reread_thread() % 32 == 0) smem.state[gather_warp()] = state;
    __syncwarp();
  }

  static __device__ __forceinline__ void enter_next(const KernelArgs& args, WarpState& state) {
    state.tile = -1;
    state.length = 0;
    for (state.query += gridDim.y; state.query < args.s_q; state.query += gridDim.y) {
      state.length = args.length_of(state.query);
      if (state.length > 0) break;
    }
  }

  // The first of the four tokens that the warp gathers of a half.
  static __device__ __forceinline__ int first_token(int half) {
    return half * (kTileTokens / 2) + gather_warp() * 4;
  }

  __device__ __forceinline__ void fetch(const KernelArgs& args, const WarpState& state) {
    const int lane = reread_thread() % 32;
    const int token =
        lane < 8 ? gather_warp() * kTokenGroup + lane : first_token(lane / 4 & 1) + lane % 4;
    const int i = state.tile * kTileTokens + token;
    row = i < state.length ? __ldg(args.indices + int64_t{state.query} * args.topk + i) : -1;
  }

  __device__ __forceinline__ void load_heads(const KernelArgs& args, SharedStorage& smem, int query,
                                             int slot) const {
    const uint32_t left = smem_address(&smem.left_full[slot]);
    const uint32_t right = smem_address(&smem.right_full[slot]);
    if (reread_thread() == kLoadingThread) {
      fence_async_proxy();  // the slot held what cp.async and stmatrix wrote
      const int first_row = query * args.h_q + first_head();
      const uint32_t target = smem_address(smem.latent[slot]);
      const uint32_t bytes = args.query_box * kChunkRowBytes;
      mbarrier_expect(left, bytes * kHalfChunks);
      tma_load_3d(target, &args.query_half_map, left, 0, first_row, 0);
      mbarrier_expect(right, bytes * (kHalfChunks + kRope));
      tma_load_3d(target + kHalfBytes, &args.query_half_map, right, 0, first_row, kHalfChunks);
      if constexpr (kRope) {
        tma_load_3d(smem_address(smem.rope[slot]), &args.query_rope_map, right, 0, first_row,
                    kLatentChunks);
      }
    }
    __syncwarp();
    if (reread_thread() % 32 == 0) mbarrier_arrive(left);
    mbarrier_arrive(left);
    mbarrier_arrive(right);
  }

  // Whether the token that this lane copies of a half is attended, and its columns.
  __device__ __forceinline__ bool find_source(const KernelArgs& args, int half,
                                              const uint8_t*& source) const {
    const int lane = reread_thread() % 32;
    const uint32_t of_token = __shfl_sync(~0u, row, 8 + half * 4 + lane / 8);
    const bool valid = of_token < args.s_kv;
    source = args.kv + int64_t{valid ? of_token : 0} * kRowBytes + lane % 8 * 16;
    return valid;
  }

  // Of this lane's token of a half and 16-byte piece, within the groups of a chunk.
  static __device__ __forceinline__ uint32_t target_offset(int half, int group_bytes) {
    const int lane = reread_thread() % 32, token = first_token(half) + lane / 8;
    return token / kTokenGroup * group_bytes + swizzled_offset(token % kTokenGroup, lane % 8);
  }

  template <int kFirst, int kLast>
  __device__ __forceinline__ void copy_latent(const KernelArgs& args, SharedStorage& smem, int slot,
                                              int half) const {
    const uint8_t* source;
    const bool valid = find_source(args, half, source);
    const uint32_t target = smem_address(smem.latent[slot]) + target_offset(half, kTokenGroupBytes);
#pragma unroll
    for (int c = kFirst; c < kLast; ++c) {
      copy_16_or_zero(target + c / kHalfChunks * kHalfBytes + c % kHalfChunks * kGroupBytes,
                      source + c * kChunkRowBytes, valid);
    }
  }

  __device__ __forceinline__ void copy_rope(const KernelArgs& args, SharedStorage& smem, int slot,
                                            int half) const {
    if constexpr (!kRope) return;
    const uint8_t* source;
    const bool valid = find_source(args, half, source);
    copy_16_or_zero(smem_address(smem.rope[slot]) + target_offset(half, kGroupBytes),
                    source + kLatentChunks * kChunkRowBytes, valid);
  }

  __device__ __forceinline__ void load_tile(const KernelArgs& args, SharedStorage& smem,
                                            int slot) const {
    const uint32_t left = smem_address(&smem.left_full[slot]);
    const uint32_t right = smem_address(&smem.right_full[slot]);
    const uint32_t attended = __ballot_sync(~0u, static_cast<uint32_t>(row) < args.s_kv);
    if (reread_thread() % 32 == 0) {
      smem.attended[slot][gather_warp()] = attended;
      mbarrier_arrive(left);
    }
    __syncwarp();
    copy_latent<0, kHalfChunks>(args, smem, slot, 1);
    mbarrier_arrive_after_copies(left);
    copy_latent<kHalfChunks, kLatentChunks>(args, smem, slot, 1);
    copy_rope(args, smem, slot, 0);
    copy_rope(args, smem, slot, 1);
    mbarrier_arrive_after_copies(right);
  }
};

}  // namespace flashmla::sm90::sparse_prefill
