// The score warpgroup: S = Q K^T, the online softmax, and the probabilities handed to the value
// warpgroups.
#pragma once

#include "sm90/attention/mask.cuh"
#include "sm90/attention/query_tile.cuh"
#include "sm90/attention/softmax_rows.cuh"
#include "sm90/dense_decode/wide/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::dense_decode::wide {

template <typename T>
__device__ __forceinline__ void score_latent(float (&s)[32], const QueryFragments& q,
                                             const SharedStorage& smem, Ring ring) {
#pragma unroll
  for (int c = 0; c < kLatentChunks; ++c) {
    if (c % kHalfChunks == 0) {
      mbarrier_wait(smem_address(&smem.half_full[c / kHalfChunks][ring.slot]), ring.parity);
      wgmma_fence();
    }
    multiply_latent_chunk<T>(s, q, smem.query_step,
                             smem_address(smem.latent[ring.slot][c / kHalfChunks]), c);
  }
}

template <typename T>
__device__ __forceinline__ void score_rope(float (&s)[32], const SharedStorage& smem, Ring ring) {
  mbarrier_wait(smem_address(&smem.rope_full[ring.slot]), ring.parity);
  wgmma_fence();
  multiply_rope<T>(s, smem_address(smem.query_rope), smem_address(smem.rope[ring.slot]));
  wgmma_commit();
}

// Sets scores of keys that a row may not see to -inf.
template <bool kGiven>
__device__ __forceinline__ void mask_tile(const KernelArgs& args, int first_row, float (&s)[32],
                                          int tile, int sequence) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int first = tile * kTileTokens + thread % 4 * 2;
  const int seqlen = args.clamp_seqlen(args.cache_seqlens[sequence]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t row = first_row + thread / 32 * 16 + thread % 32 / 4 + 8 * r;
    int seen;
    if constexpr (kGiven) {
      const int32_t* limits = args.seen + int64_t{sequence} * args.s_q;
      seen = given_tokens(limits, seqlen, row, args.h_q, args.s_q);
    } else {
      seen = seen_tokens(seqlen, row, args.h_q, args.s_q, args.causal);
    }
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      if (first + 2 * i >= seen) s[i + 2 * r] = -INFINITY;
      if (first + 2 * i + 1 >= seen) s[i + 2 * r + 1] = -INFINITY;
    }
  }
}

template <typename T, bool kGiven>
__device__ void run_scores(const KernelArgs& args, SharedStorage& smem) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const bool warp_leader = thread % 32 == 0;
  QueryFragments q;
  float s[32];
  Ring ring;
  bool odd_piece = false;  // counting pieces that are not empty

  for (int sequence = smem.begin.sequence; owns_work(smem.begin, smem.end, sequence); ++sequence) {
    const int length = args.cache_seqlens[sequence];  // on its way while the queries are taken
    SoftmaxRows rows;

    mbarrier_wait(smem_address(&smem.half_full[0][ring.slot]), ring.parity);
    mbarrier_wait(smem_address(&smem.half_full[1][ring.slot]), ring.parity);
    mbarrier_wait(smem_address(&smem.rope_full[ring.slot]), ring.parity);
    take_query<true>(q, smem.query_step, smem_address(smem.query_rope),
                     smem_address(smem.latent[ring.slot]), smem_address(smem.rope[ring.slot]),
                     args.query_box, kScoreBarrier);
    const int seqlen = args.clamp_seqlen(length);
    const Piece piece = piece_of(smem.begin, smem.end, sequence, seqlen);
    const int unmasked_tiles = count_unmasked_tiles(seqlen, args.s_q, args.causal);
    if (warp_leader) {
      // Nobody waits for the first three here: arriving keeps their parity aligned with the ring.
      mbarrier_arrive(smem_address(&smem.scores_done[ring.slot]));
      mbarrier_arrive(smem_address(&smem.probabilities_stored[ring.slot]));
      mbarrier_arrive(smem_address(&smem.values_go[ring.slot]));
      mbarrier_arrive(smem_address(&smem.load_done[ring.slot]));
    }
    ring.advance();
    if (piece.tile_begin < piece.tile_end) {
      score_latent<T>(s, q, smem, ring);
      score_rope<T>(s, smem, ring);
    }
    wgmma_wait<0>();

    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      pin_registers(s);
      const uint32_t scores_done = smem_address(&smem.scores_done[ring.slot]);
      if (warp_leader) mbarrier_arrive(scores_done);
      if (tile >= unmasked_tiles) mask_tile<kGiven>(args, smem.row_tile.first, s, tile, sequence);
      update_references(smem.rescale[ring.slot], s, rows, args.scale_log2);
      store_probabilities<T, false>(s, rows, args.scale_log2, smem_address(smem.rope[ring.slot]),
                                    scores_done, ring.parity);
      const bool last = tile + 1 == piece.tile_end;
      if (last) finish_sums(smem.inverse_sum[odd_piece], rows);
      fence_async_proxy();
      __syncwarp();
      if (warp_leader) {
        mbarrier_arrive(smem_address(&smem.probabilities_stored[ring.slot]));
        mbarrier_arrive(smem_address(&smem.load_done[ring.slot]));
      }

      // The next scores go first on the tensor cores: then these have the value products to do
      // while this warpgroup computes the next softmax.
      const uint32_t values_go = smem_address(&smem.values_go[ring.slot]);
      ring.advance();
      if (!last) {
        score_latent<T>(s, q, smem, ring);
        score_rope<T>(s, smem, ring);
      }
      if (warp_leader) mbarrier_arrive(values_go);
      wgmma_wait<0>();
    }
    odd_piece ^= piece.tile_begin < piece.tile_end;
    store_lse(args.lse_rows(result_index(piece, blockIdx.z, sequence), piece.partial()) +
                  smem.row_tile.first,
              smem.row_tile.count, rows, piece.partial());
  }
}

}  // namespace flashmla::sm90::dense_decode::wide
