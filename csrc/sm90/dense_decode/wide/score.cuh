// The score warpgroup: S = Q K^T, the online softmax, and the probabilities handed to the value
// warpgroups.
#pragma once

#include "sm90/attention/mask.cuh"
#include "sm90/attention/softmax.cuh"
#include "sm90/dense_decode/wide/query.cuh"
#include "sm90/dense_decode/wide/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::dense_decode::wide {

// Running state of this thread's two rows, lane / 4 and lane / 4 + 8 of the warp's 16.
struct SoftmaxRows {
  float reference[2] = {-INFINITY, -INFINITY};  // base-2 exponent that maps to 1
  float sum[2] = {0.0f, 0.0f};                  // this thread's columns only
};

template <typename T>
__device__ __forceinline__ void score_latent(float (&s)[32], const QueryFragments& q,
                                             const SharedStorage& smem, Ring ring) {
#pragma unroll
  for (int c = 0; c < kLatentChunks; ++c) {
    if (c % kHalfChunks == 0) {
      mbarrier_wait(smem_address(&smem.half_full[c / kHalfChunks][ring.slot]), ring.parity);
      wgmma_fence();
    }
    const uint64_t keys = k_major_desc(
        smem_address(smem.latent[ring.slot][c / kHalfChunks]) + c % kHalfChunks * kGroupBytes,
        kTokenGroupBytes);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int step = c * 4 + k;
      if (step < kQueryStepsInRegisters) {
        wgmma_n64_rs<T>(s, q[step], keys + 2 * k, step > 0);
      } else {
        const uint64_t query =
            unswizzled_desc(smem_address(smem.query_step), kTileRows * 16, 8 * 16);
        wgmma_n64_ss<T>(s, query, keys + 2 * k, 1);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void score_rope(float (&s)[32], const SharedStorage& smem, Ring ring) {
  mbarrier_wait(smem_address(&smem.rope_full[ring.slot]), ring.parity);
  wgmma_fence();
  const uint64_t query = k_major_desc(smem_address(smem.query_rope));
  const uint64_t keys = k_major_desc(smem_address(smem.rope[ring.slot]));
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_n64_ss<T>(s, query + 2 * k, keys + 2 * k, 1);
  wgmma_commit();
}

// Sets scores of keys that a row may not see to -inf.
__device__ __forceinline__ void mask_tile(const KernelArgs& args, int first_row, float (&s)[32],
                                          int tile, int seqlen) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int first = tile * kTileTokens + thread % 4 * 2;
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

// Moves the rows' references where their maxima ask for it, and tells the value warpgroups. Past a
// sequence's first tiles that is seldom, and the maxima over other lanes' columns are not needed.
__device__ __forceinline__ void update_references(uint8_t (&rescale)[kTileRows],
                                                  const float (&s)[32], SoftmaxRows& rows,
                                                  float scale_log2) {
  float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    peak[0] = fmaxf(peak[0], fmaxf(s[i], s[i + 1]));
    peak[1] = fmaxf(peak[1], fmaxf(s[i + 2], s[i + 3]));
  }
  int power[2] = {0, 0};
  if (__any_sync(~0u, outgrows(peak[0], scale_log2, rows.reference[0]) ||
                          outgrows(peak[1], scale_log2, rows.reference[1]))) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int lane = 1; lane <= 2; lane *= 2) {
        peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], lane));
      }
      power[r] = raise_reference(rows.reference[r], rows.sum[r], peak[r] * scale_log2);
    }
  }
  const int thread = threadIdx.x % kWarpgroupThreads;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // The four lanes of a row all write the same.
    rescale[thread / 32 * 16 + thread % 32 / 4 + 8 * r] = power[r];
  }
}

// Turns scores into probabilities, adds them to the rows' sums and stores them to the slot of the
// rope columns, once all warps have read these.
template <typename T>
__device__ __forceinline__ void store_probabilities(float (&s)[32], SoftmaxRows& rows,
                                                    float scale_log2, uint32_t slot,
                                                    uint32_t scores_done, uint32_t parity) {
  const int lane = threadIdx.x % 32;
  const int row = (threadIdx.x % kWarpgroupThreads) / 32 * 16 + (lane & 15);
  const float offset[2] = {finite_reference(rows.reference[0]),
                           finite_reference(rows.reference[1])};
  float sum[2][2] = {};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // row j % 2, columns 16 k + 8 (j / 2) and the next
      float& low = s[8 * k + 2 * j];
      float& high = s[8 * k + 2 * j + 1];
      low = exp2_approx(fmaf(low, scale_log2, -offset[j % 2]));
      high = exp2_approx(fmaf(high, scale_log2, -offset[j % 2]));
      sum[j % 2][0] += low;
      sum[j % 2][1] += high;
      packed[j] = pack<T>(low, high);
    }
    if (k == 0) mbarrier_wait(scores_done, parity);
    store_matrix_x4(slot + swizzled_offset(row, k * 2 + lane / 16), packed[0], packed[1], packed[2],
                    packed[3]);
  }
  rows.sum[0] += sum[0][0] + sum[0][1];
  rows.sum[1] += sum[1][0] + sum[1][1];
}

// The rows' sums over all columns, and their inverses for the value warpgroups.
__device__ __forceinline__ void finish_sums(float (&inverse_sum)[kTileRows], SoftmaxRows& rows) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % kWarpgroupThreads / 32 * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 1);
    rows.sum[r] += __shfl_xor_sync(~0u, rows.sum[r], 2);
    const float inverse = inverse_of_sum(rows.sum[r]);
    if (lane % 4 == 0) inverse_sum[row + 8 * r] = inverse;
  }
}

// Stores the rows' log-sum-exps, from their finished sums. index: the sequence or, if partial, the
// workspace slot.
__device__ __forceinline__ void store_lse(const KernelArgs& args, RowTile tile,
                                          const SoftmaxRows& rows, bool partial, int index) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % kWarpgroupThreads / 32 * 16 + lane / 4;
  if (lane % 4 != 0) return;
  float* target = args.lse_rows(index, partial) + tile.first;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float lse = row_lse(rows.reference[r], rows.sum[r], partial);
    if (row + 8 * r < tile.count) target[row + 8 * r] = lse;
  }
}

template <typename T>
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

    take_query(smem, ring, args.query_box, kScoreBarrier, q);
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
      if (tile >= unmasked_tiles)
        mask_tile(args, smem.row_tile.first, s, tile,
                  args.clamp_seqlen(args.cache_seqlens[sequence]));
      update_references(smem.rescale[ring.slot], s, rows, args.scale_log2);
      store_probabilities<T>(s, rows, args.scale_log2, smem_address(smem.rope[ring.slot]),
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
    store_lse(args, smem.row_tile, rows, piece.partial(),
              result_index(piece, blockIdx.z, sequence));
  }
}

}  // namespace flashmla::sm90::dense_decode::wide
