// The score warpgroup: S = Q K^T, the online softmax, and the probabilities handed to the value
// warpgroups.
#pragma once

#include "sm90/attention/mask.cuh"
#include "sm90/attention/query_tile.cuh"
#include "sm90/attention/softmax_rows.cuh"
#include "sm90/dense_decode/fp8/wide/shared_storage.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::dense_decode::fp8::wide {

// Starts the products of a tile that is there.
__device__ __forceinline__ void start_scores(float (&s)[32], const QueryFragments& q,
                                             const WideStorage& smem, Ring ring) {
  wgmma_fence();
#pragma unroll
  for (int c = 0; c < kLatentChunks; ++c) {
    multiply_latent_chunk<Value>(s, q, smem.query_step,
                                 smem_address(smem.latent[ring.slot][c / kHalfChunks]), c);
  }
  multiply_rope<Value>(s, smem_address(smem.query_rope), smem_address(smem.rope[ring.slot]));
  wgmma_commit();
}

// Sets scores of keys that a row may not see to -inf.
__device__ __forceinline__ void mask_tile(const WideArgs& args, int first_row, float (&s)[32],
                                          int tile, int sequence) {
  const int thread = reread_thread();
  const int first = tile * kTileTokens + thread % 4 * 2;
  const int seqlen = args.clamp_seqlen(args.cache_seqlens[sequence]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t row = first_row + thread / 32 * 16 + thread % 32 / 4 + 8 * r;
    const int seen = seen_tokens(seqlen, row, args.h_q, args.s_q, args.causal);
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      if (first + 2 * i >= seen) s[i + 2 * r] = -INFINITY;
      if (first + 2 * i + 1 >= seen) s[i + 2 * r + 1] = -INFINITY;
    }
  }
}

__device__ void run_scores(const WideArgs& args, WideStorage& smem) {
  const bool leader = threadIdx.x % 32 == 0;
  QueryFragments q;
  Ring ring;

  for (int sequence = smem.begin.sequence; owns_work(smem.begin, smem.end, sequence); ++sequence) {
    const int seqlen = args.clamp_seqlen(args.cache_seqlens[sequence]);
    const Piece piece = piece_of(smem.begin, smem.end, sequence, seqlen);
    SoftmaxRows rows;
    if (piece.tile_begin < piece.tile_end) {
      const int unmasked_tiles = count_unmasked_tiles(seqlen, args.s_q, args.causal);
      mbarrier_wait(smem_address(&smem.full[ring.slot]), ring.parity);
      take_query<true>(q, smem.query_step, smem_address(smem.query_rope),
                       smem_address(smem.latent[ring.slot]), smem_address(smem.rope[ring.slot]),
                       args.query_box, kTakeBarrier);
      if (leader) {
        // Nobody waits for the first and the last here: arriving keeps their parity aligned.
        mbarrier_arrive(smem_address(&smem.scores_done[ring.slot]));
        mbarrier_arrive(smem_address(&smem.probabilities_stored[ring.slot]));
        mbarrier_arrive(smem_address(&smem.values_go[ring.slot]));
      }
      ring.advance();
      mbarrier_wait(smem_address(&smem.full[ring.slot]), ring.parity);
      float s[32] = {};  // so that nothing is kept in its registers between pieces
      start_scores(s, q, smem, ring);
      wgmma_wait<0>();

      for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
        pin_registers(s);
        const uint32_t scores_done = smem_address(&smem.scores_done[ring.slot]);
        if (leader) mbarrier_arrive(scores_done);
        if (tile >= unmasked_tiles) mask_tile(args, first_query_row(), s, tile, sequence);
        update_references<true>(smem.rescale[ring.slot], s, rows, args.scale_log2);
        store_probabilities<Value, true>(
            s, rows, args.scale_log2, smem_address(smem.rope[ring.slot]), scores_done, ring.parity);
        const bool last = tile + 1 == piece.tile_end;
        // The piece before has been stored: its sums may be overwritten.
        if (tile == piece.tile_begin) {
          const Ring queries = ring.before();
          mbarrier_wait(smem_address(&smem.load_done[queries.slot]), queries.parity);
        }
        if (last) finish_sums(smem.inverse_sum, rows);
        fence_async_proxy();
        __syncwarp();
        if (leader) mbarrier_arrive(smem_address(&smem.probabilities_stored[ring.slot]));

        // The next scores go first on the tensor cores: then these have the value products to do
        // while this warpgroup computes the next softmax.
        const uint32_t values_go = smem_address(&smem.values_go[ring.slot]);
        ring.advance();
        if (!last) {
          mbarrier_wait(smem_address(&smem.full[ring.slot]), ring.parity);
          start_scores(s, q, smem, ring);
        }
        if (leader) mbarrier_arrive(values_go);
        wgmma_wait<0>();
      }
    }
    const Piece part = piece_of_tiles(smem.begin, smem.end, sequence, 0);
    store_lse(
        args.lse_rows(result_index(part, blockIdx.y, sequence), part.partial()) + first_query_row(),
        count_query_rows(args), rows, part.partial());
  }
}

}  // namespace flashmla::sm90::dense_decode::fp8::wide
