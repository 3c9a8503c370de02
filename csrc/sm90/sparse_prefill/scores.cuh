// The score warpgroup: S = Q K^T, whose rows are heads and whose columns are a
// tile's tokens; the online softmax; probabilities for the value warpgroups.
#pragma once

#include "sm90/attention/query_tile.cuh"
#include "sm90/attention/softmax_rows.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/sparse_prefill/shared_storage.cuh"

namespace flashmla::sm90::sparse_prefill {

// Starts the products of a tile that is there, after a proxy fence.
template <typename T, bool kRope>
__device__ __forceinline__ void start_scores(float (&s)[32], const QueryFragments& q,
                                             const SharedStorage& smem, Ring ring) {
  wgmma_fence();
#pragma unroll
  for (int c = 0; c < kLatentChunks; ++c) {
    multiply_latent_chunk<T>(s, q, smem.query_step,
                             smem_address(smem.latent[ring.slot][c / kHalfChunks]), c);
  }
  if constexpr (kRope) {
    multiply_rope<T>(s, smem_address(smem.query_rope), smem_address(smem.rope[ring.slot]));
  }
  wgmma_commit();
}

// Scores of tokens that are not attended become -inf.
__device__ __forceinline__ void mask_scores(float (&s)[32], const uint8_t (&attended)[8]) {
  const uint2 words = *reinterpret_cast<const uint2*>(attended);
  if ((words.x & words.y) == ~0u) [[likely]]
    return;
  const int first = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const uint32_t pair = (i < 16 ? words.x : words.y) >> (first + 2 * i % 32);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!(pair & 1)) s[i + 2 * r] = -INFINITY;
      if (!(pair & 2)) s[i + 2 * r + 1] = -INFINITY;
    }
  }
}

// What a query token's rows come to: their sums, what the value warpgroups are
// to multiply with, and the results but out.
__device__ __forceinline__ void finish_rows(const KernelArgs& args, int query,
                                            float (&out_factor)[kTileRows], SoftmaxRows& rows,
                                            const float (&peak)[2]) {
  finish_sums(out_factor, rows);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    const int head = first_head() + row + 8 * r;
    if (lane % 4 != 0 || head >= args.h_q) continue;
    const float lse = row_lse(rows.reference[r], rows.sum[r], /*partial=*/false);
    if (args.attn_sink != nullptr && lse > -INFINITY) {
      out_factor[row + 8 * r] *=
          reciprocal_approx(1.0f + exp2_approx((__ldg(args.attn_sink + head) - lse) * kLog2e));
    }
    const uint32_t result = result_row(args, query, row + 8 * r);
    args.lse[result] = lse;
    args.max_logits[result] = largest * args.sm_scale;
  }
}

template <typename T, bool kRope>
__device__ void run_scores(const KernelArgs& args, SharedStorage& smem) {
  const bool leader = threadIdx.x % 32 == 0;
  QueryFragments q;
  float s[32];
  Ring ring;
  uint8_t& odd = smem.odd_query[threadIdx.x / 32];

  for (int query = blockIdx.y; query < args.s_q; query += args.query_stride) {
    int tiles = num_tiles(args.length_of(query));
    if (tiles == 0) {
      const int head = reread_thread();
      if (head < count_heads(args)) {
        const uint32_t result = result_row(args, query, head);
        args.lse[result] = args.max_logits[result] = -INFINITY;
      }
      continue;
    }
    SoftmaxRows rows;
    float peak[2] = {-INFINITY, -INFINITY};
    mbarrier_wait(smem_address(&smem.full[ring.slot]), ring.parity);
    take_query<kRope>(q, smem.query_step, smem_address(smem.query_rope),
                      smem_address(smem.latent[ring.slot]), smem_address(smem.rope[ring.slot]),
                      args.query_box, kScoreBarrier);
    if (leader) {
      // Nobody waits for the first and the last here: arriving keeps their
      // parity aligned with the ring.
      mbarrier_arrive(smem_address(&smem.scores_done));
      mbarrier_arrive(smem_address(&smem.probabilities_stored[ring.slot]));
      mbarrier_arrive(smem_address(&smem.values_go[ring.slot]));
    }
    ring.advance();
    mbarrier_wait(smem_address(&smem.full[ring.slot]), ring.parity);
    fence_async_proxy();  // the tile was written by cp.async
    start_scores<T, kRope>(s, q, smem, ring);
    wgmma_wait<0>();

    for (; tiles > 0; --tiles) {
      pin_registers(s);
      if (leader) mbarrier_arrive(smem_address(&smem.scores_done));
      const bool last = tiles == 1;
      const Ring tile = ring;
      ring.advance();
      // Whether the next scores can start at once: told beforehand, as the answer takes its time.
      const bool ready = !last && mbarrier_test(smem_address(&smem.full[ring.slot]), ring.parity);
      mask_scores(s, smem.attended[tile.slot]);
      float tile_peak[2];
      find_peaks(s, tile_peak);
#pragma unroll
      for (int r = 0; r < 2; ++r) peak[r] = fmaxf(peak[r], tile_peak[r]);
      raise_references(smem.rescale[tile.slot], tile_peak, rows, args.scale_log2);
      store_probabilities<T, false>(s, rows, args.scale_log2, smem_address(smem.rope[tile.slot]),
                                    smem_address(&smem.scores_done), parity_of(tile));
      if (last) [[unlikely]]
        finish_rows(args, query, smem.out_factor[odd], rows, peak);
      fence_async_proxy();  // probabilities were stored, and the next tile was written by cp.async
      __syncwarp();
      if (leader) mbarrier_arrive(smem_address(&smem.probabilities_stored[tile.slot]));

      // The next scores go first on the tensor cores, if their tile is there: then these have the
      // value products to do while this warpgroup computes the next softmax.
      const uint32_t values_go = smem_address(&smem.values_go[tile.slot]);
      if (!ready) [[unlikely]] {
        if (leader) mbarrier_arrive(values_go);
        if (!last) {
          mbarrier_wait(smem_address(&smem.full[ring.slot]), ring.parity);
          fence_async_proxy();
        }
      }
      if (!last) start_scores<T, kRope>(s, q, smem, ring);
      if (leader && ready) mbarrier_arrive(values_go);
      wgmma_wait<0>();
    }
    if (leader) odd ^= 1;
    __syncwarp();
  }
}

}  // namespace flashmla::sm90::sparse_prefill
