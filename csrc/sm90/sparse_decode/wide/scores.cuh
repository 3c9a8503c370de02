// The score warpgroup: S = Q K^T, whose rows are heads and whose columns are a tile's tokens; the
// online softmax; probabilities for the value warpgroups.
#pragma once

#include "sm90/attention/softmax_rows.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/sparse_decode/softmax.cuh"
#include "sm90/sparse_decode/wide/work.cuh"

namespace flashmla::sm90::sparse::wide {

// Loads a query token's heads. By one thread, when all products with the last one's are done.
template <typename Storage>
__device__ __forceinline__ void load_query(const KernelArgs& args, Storage& smem, int query) {
  const uint32_t full = smem_address(&smem.query_full);
  mbarrier_arrive_expect(full, args.query_box * kChunkRowBytes * Storage::kChunks);
  tma_load_3d(smem_address(smem.query[0]), &args.query_map, full, 0,
              query * args.common.h_q + blockIdx.x * kRows, 0);
}

// Starts a tile's products, when its first keys are there. With a ring others may still come, in
// the order in which they are converted.
template <typename T, typename Storage>
__device__ __forceinline__ void start_scores(float (&s)[32], Storage& smem, uint32_t tile,
                                             int query_box) {
  const int buffer = Storage::buffer_of(tile);
  const uint64_t query = k_major_desc(Storage::query_at());
  const uint64_t keys = k_major_desc(Storage::keys_at(buffer, 0));
  const auto multiply = [&](int chunk, uint64_t columns, bool accumulate) {
    const uint64_t rows = query + chunk * (query_box * (kChunkRowBytes / 16));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma_ss<T>(s, rows + 2 * k, columns + 2 * k, accumulate || k > 0);
    }
  };
  wgmma_fence();
  if constexpr (Storage::kRing) {
    if constexpr (Storage::kRope) {
      multiply(kLatentChunks, k_major_desc(Storage::rope_at(tile % Storage::kSlots)), false);
    }
#pragma unroll
    for (int i = 0; i < kLatentChunks; ++i) {
      const int step = i / kWarpChunks;
      if (step > 1 && i % kWarpChunks == 0) {
        mbarrier_wait(smem_address(&smem.keys_full[buffer][step - 1]), Storage::parity_of(tile));
        fence_async_proxy();
      }
      const int chunk = group_of(step) * kWarpChunks + i % kWarpChunks;
      multiply(chunk, keys + chunk * (kChunkBytes / 16), Storage::kRope || i > 0);
    }
  } else {
#pragma unroll
    for (int c = 0; c < Storage::kChunks; ++c) multiply(c, keys + c * (kChunkBytes / 16), c > 0);
  }
  wgmma_commit();
}

// Scores of tokens that are not attended become -inf. Of eight tokens a thread has two neighbours.
__device__ __forceinline__ void mask_scores(float (&s)[32], const uint32_t (&attended)[2]) {
  const uint2 words = *reinterpret_cast<const uint2*>(attended);
  if ((words.x & words.y) == ~0u) return;
  const int first = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const uint32_t pair = (i < 16 ? words.x : words.y) >> (i % 16 * 2 + first);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!(pair & 1)) s[i + 2 * r] = -INFINITY;
      if (!(pair & 2)) s[i + 2 * r + 1] = -INFINITY;
    }
  }
}

// What all codes of the cache are to be multiplied with.
template <typename Format>
__device__ __forceinline__ float cache_scale(const sparse::KernelArgs& args) {
  if constexpr (Format::kCodes == Codes::kE4M3 && Format::kScales == Scales::kNone) {
    return __ldg(args.kv_scale);
  } else {
    return 1.0f;
  }
}

// The rows' sums, and what the value warpgroups are to multiply with, sinks and the cache's scale
// included.
template <typename Format>
__device__ __forceinline__ void finish_rows(const sparse::KernelArgs& args, HeadTile heads,
                                            float (&inverse_sum)[kRows], SoftmaxRows& rows,
                                            bool partial) {
  finish_sums(inverse_sum, rows);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
  if (lane % 4 != 0) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) inverse_sum[row + 8 * r] *= cache_scale<Format>(args);
  if (partial || args.attn_sink == nullptr) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= heads.count || !(rows.sum[r] > 0.0f)) continue;
    inverse_sum[row + 8 * r] *= sink_share(row_lse_log2(rows.reference[r], rows.sum[r]),
                                           args.attn_sink[heads.first + row + 8 * r]);
  }
}

template <typename T, typename Main, typename Extra, Feed kFeed>
__device__ void run_scores(const KernelArgs& kernel_args, SharedStorage<Main, Extra, kFeed>& smem) {
  using Storage = SharedStorage<Main, Extra, kFeed>;
  constexpr bool kHoldValues = kFeed == Feed::kCopy;
  const sparse::KernelArgs& args = kernel_args.common;
  const bool leader = threadIdx.x % 32 == 0;
  const HeadTile heads = HeadTile::of_block<kRows>(args);
  const auto lse_rows = [&](const PieceWalk& piece) {
    return (piece.partial() ? args.lse_accum : args.lse) + piece.first_row(args.h_q) + heads.first;
  };
  const auto on_empty = [&](const PieceWalk& piece) {
    if (threadIdx.x < heads.count) lse_rows(piece)[threadIdx.x] = -INFINITY;
  };
  PieceWalk walk = PieceWalk::before(smem.begin);
  walk.next(args, smem.begin, smem.end, on_empty);
  if (!walk.done() && threadIdx.x == 0) load_query(kernel_args, smem, walk.query);
  const float scale_log2 = args.scale_log2 * cache_scale<Main>(args);
  float s[32];
  uint32_t tile = 0;  // of the part
  int pieces = 0;

  while (!walk.done()) {
    const PieceWalk piece = walk;
    SoftmaxRows rows;
    mbarrier_wait(smem_address(&smem.query_full), pieces & 1);
    for (int tiles = piece.tiles; tiles > 0; --tiles) {
      // These products go first on the tensor cores, if their keys are there: then these have the
      // last tile's value products to do while this warpgroup computes the softmax.
      const int buffer = Storage::buffer_of(tile);
      const uint32_t parity = Storage::parity_of(tile);
      const uint32_t full = smem_address(&smem.keys_full[buffer][0]);
      const uint32_t last_go = smem_address(&smem.values_go[Storage::buffer_of(tile + 1)]);
      const bool ready = kHoldValues && mbarrier_test(full, parity);
      if (kHoldValues && leader && !ready && tile > 0) mbarrier_arrive(last_go);
      mbarrier_wait(full, parity);
      if constexpr (kFeed != Feed::kPeers) fence_async_proxy();
      start_scores<T>(s, smem, tile, kernel_args.query_box);
      if (leader && ready && tile > 0) mbarrier_arrive(last_go);
      const bool last = tiles == 1;
      if (last) walk.next(args, smem.begin, smem.end, on_empty);
      wgmma_wait<0>();
      pin_registers(s);
      const uint32_t scores_done = smem_address(&smem.scores_done[buffer]);
      if (leader) mbarrier_arrive(scores_done);
      mask_scores(s, smem.attended[tile % kPlans]);
      update_references<true>(smem.rescale[buffer], s, rows, scale_log2);
      store_probabilities<T, true>(s, rows, scale_log2, smem_address(smem.probabilities(buffer)),
                                   scores_done, parity);
      if (last) {
        finish_rows<Main>(args, heads, smem.inverse_sum[pieces % 3], rows, piece.partial());
        if (!walk.done() && threadIdx.x == 0) load_query(kernel_args, smem, walk.query);
      }
      fence_async_proxy();
      __syncwarp();
      if (leader) {
        mbarrier_arrive(smem_address(&smem.probabilities_stored[buffer]));
        if (!kHoldValues || (last && walk.done())) {
          mbarrier_arrive(smem_address(&smem.values_go[buffer]));
        }
      }
      ++tile;
    }
    store_lse(lse_rows(piece), heads.count, rows, piece.partial());
    ++pieces;
  }
}

}  // namespace flashmla::sm90::sparse::wide
