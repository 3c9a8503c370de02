// The narrow kernel's score warpgroup: S^T = K Q^T, softmax over the tokens, which are the rows,
// and P^T for the value warpgroups. Registers named by `i` belong to a thread's query rows.
#pragma once

#include "sm90/attention/mask.cuh"
#include "sm90/attention/softmax.cuh"
#include "sm90/dense_decode/narrow/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::dense_decode::narrow {

__device__ __forceinline__ void copy_shared(void* target, const void* source, int bytes) {
#pragma unroll
  for (int i = 0; i < bytes; i += kWarpgroupThreads * 16) {
    const uint32_t offset = i + threadIdx.x * 16;
    store_shared(smem_address(target) + offset, load_shared(smem_address(source) + offset));
  }
}

// Takes the queries out of the ring.
template <int kRows>
__device__ __forceinline__ void take_query(SharedStorage<kRows>& smem, Ring ring) {
  constexpr int kRowsChunkBytes = kRows * kChunkRowBytes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mbarrier_wait(smem_address(&smem.half_full[half][ring.slot]), ring.parity);
    copy_shared(smem.query[half * kHalfChunks], smem.latent[ring.slot][half],
                kHalfChunks * kRowsChunkBytes);
  }
  mbarrier_wait(smem_address(&smem.rope_full[ring.slot]), ring.parity);
  copy_shared(smem.query[kLatentChunks], smem.rope[ring.slot], kRowsChunkBytes);
  fence_async_proxy();
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
}

template <typename T, int kRows>
__device__ __forceinline__ void compute_scores(float (&s)[kRows / 2],
                                               const SharedStorage<kRows>& smem, Ring ring) {
  float other[kRows / 2];  // two sums, as a product waits for the last one of its own
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const bool rope = c == kLatentChunks;
    if (c % kHalfChunks == 0) {
      if (rope) {
        mbarrier_wait(smem_address(&smem.rope_full[ring.slot]), ring.parity);
      } else {
        mbarrier_wait(smem_address(&smem.half_full[c / kHalfChunks][ring.slot]), ring.parity);
      }
      wgmma_fence();
    }
    const uint64_t keys = rope
                              ? k_major_desc(smem_address(smem.rope[ring.slot]))
                              : k_major_desc(smem_address(smem.latent[ring.slot][c / kHalfChunks]) +
                                                 c % kHalfChunks * kGroupBytes,
                                             kTokenGroupBytes);
    const uint64_t query = k_major_desc(smem_address(smem.query[c]));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma_ss<T, /*kTransposedA=*/false>(k % 2 == 0 ? s : other, keys + 2 * k, query + 2 * k,
                                          c + k / 2 > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin_registers(s);
  pin_registers(other);
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) s[i] += other[i];
}

// Sets scores of keys that a row may not see to -inf.
template <int kRows, bool kGiven>
__device__ __forceinline__ void mask_tile(const KernelArgs& args, int first_row,
                                          float (&s)[kRows / 2], int tile, int sequence,
                                          int seqlen) {
  const int token = tile * kTileTokens + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < thread_rows(kRows); ++i) {
    const uint32_t row = first_row + query_row(i);
    int seen;
    if constexpr (kGiven) {
      const int32_t* limits = args.seen + int64_t{sequence} * args.s_q;
      seen = given_tokens(limits, seqlen, row, args.h_q, args.s_q);
    } else {
      seen = seen_tokens(seqlen, row, args.h_q, args.s_q, args.causal);
    }
    if (token >= seen) s[element(i, 0)] = -INFINITY;
    if (token + 8 >= seen) s[element(i, 1)] = -INFINITY;
  }
}

// Combines the values that all threads of the warpgroup hold of a row. exchange: another one in
// each call.
template <int kRows, typename Combine>
__device__ __forceinline__ void combine_rows(float (&exchange)[kWarpgroupWarps][kRows],
                                             float (&x)[thread_rows(kRows)], Combine combine) {
#pragma unroll
  for (int lane = 4; lane <= 16; lane *= 2) {
#pragma unroll
    for (int i = 0; i < thread_rows(kRows); ++i) {
      x[i] = combine(x[i], __shfl_xor_sync(~0u, x[i], lane));
    }
  }
  if (threadIdx.x % 32 < 4) {
#pragma unroll
    for (int i = 0; i < thread_rows(kRows); i += 2) {
      *reinterpret_cast<float2*>(&exchange[threadIdx.x / 32][query_row(i)]) = {x[i], x[i + 1]};
    }
  }
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
#pragma unroll
  for (int i = 0; i < thread_rows(kRows); i += 2) {
    float2 of[kWarpgroupWarps];
#pragma unroll
    for (int warp = 0; warp < kWarpgroupWarps; ++warp) {
      of[warp] = *reinterpret_cast<const float2*>(&exchange[warp][query_row(i)]);
    }
    x[i] = combine(combine(of[0].x, of[1].x), combine(of[2].x, of[3].x));
    x[i + 1] = combine(combine(of[0].y, of[1].y), combine(of[2].y, of[3].y));
  }
}

// Stores probabilities as wgmma's B operand, K-major and not swizzled: eight tokens' 16 bytes of
// eight rows, then of the next eight rows, then the next eight tokens.
template <typename T, int kRows>
__device__ __forceinline__ void store_probabilities(const float (&p)[kRows / 2], uint32_t target) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int matrix = lane / 8;  // tokens % 16 / 8, rows / 8
#pragma unroll
  for (int rows = 0; rows < kRows; rows += 16) {
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = rows / 4 + j / 2 * 2;
      packed[j] = pack<T>(p[element(i, j % 2)], p[element(i + 1, j % 2)]);
    }
    store_matrix_x4_trans(target + (warp * 2 + matrix % 2) * (kRows * 16) +
                              (rows + matrix / 2 * 8) * 16 + lane % 8 * 16,
                          packed[0], packed[1], packed[2], packed[3]);
  }
}

// Stores the rows' log-sum-exps; called by the first four threads, which hold all rows. index: the
// sequence or, if partial, the workspace slot.
template <int kRows>
__device__ __forceinline__ void store_lse(const KernelArgs& args, RowTile tile,
                                          const float (&reference)[thread_rows(kRows)],
                                          const float (&sum)[thread_rows(kRows)], bool partial,
                                          int index) {
  float* target = args.lse_rows(index, partial) + tile.first;
#pragma unroll
  for (int i = 0; i < thread_rows(kRows); ++i) {
    const float lse = row_lse(reference[i], sum[i], partial);
    if (query_row(i) < tile.count) target[query_row(i)] = lse;
  }
}

template <typename T, bool kGiven, int kRows>
__device__ void run_scores(const KernelArgs& args, SharedStorage<kRows>& smem, Cut begin, Cut end) {
  constexpr int kThreadRows = thread_rows(kRows);
  const bool warp_leader = threadIdx.x % 32 == 0;
  Ring ring;
  uint32_t sums_parity = 1;
  int turn = 0;

  for (int sequence = begin.sequence; owns_work(begin, end, sequence); ++sequence) {
    const int length = args.cache_seqlens[sequence];  // on its way while the queries are taken
    take_query(smem, ring);
    if (warp_leader) mbarrier_arrive(smem_address(&smem.probabilities_stored[ring.slot]));
    ring.advance();
    const int seqlen = args.clamp_seqlen(length);
    const Piece piece = piece_of(begin, end, sequence, seqlen);
    const int unmasked_tiles = count_unmasked_tiles(seqlen, args.s_q, args.causal);
    float reference[kThreadRows], sum[kThreadRows];
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      reference[i] = -INFINITY;
      sum[i] = 0.0f;
    }

    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      const int slot = ring.slot;
      float s[kRows / 2], peak[kThreadRows];
      compute_scores<T>(s, smem, ring);
      if (tile >= unmasked_tiles)
        mask_tile<kRows, kGiven>(args, smem.row_tile.first, s, tile, sequence, seqlen);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) peak[i] = fmaxf(s[element(i, 0)], s[element(i, 1)]);
      bool raise = true;  // past a sequence's first tiles it is seldom
      if (tile > piece.tile_begin) {
        bool mine = false;
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i)
          mine |= outgrows(peak[i], args.scale_log2, reference[i]);
        raise = named_barrier_any(kScoreBarrier, kWarpgroupThreads, mine);
      }
      int power[kThreadRows] = {};
      if (raise) {
        combine_rows<kRows>(smem.exchange[turn], peak,
                            [](float a, float b) { return fmaxf(a, b); });
        turn ^= 1;
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
          power[i] = raise_reference(reference[i], sum[i], peak[i] * args.scale_log2);
        }
      }
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        if (threadIdx.x < 4) smem.rescale[slot][query_row(i)] = power[i];
        const float offset = finite_reference(reference[i]);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float& score = s[element(i, m)];
          score = exp2_approx(fmaf(score, args.scale_log2, -offset));
        }
        sum[i] += s[element(i, 0)] + s[element(i, 1)];
      }
      // All warps are past this tile's products, as they have met: its rope columns may go.
      store_probabilities<T, kRows>(s, smem_address(smem.rope[ring.slot]));
      fence_async_proxy();
      __syncwarp();
      if (warp_leader) mbarrier_arrive(smem_address(&smem.probabilities_stored[slot]));
      ring.advance();
    }

    const bool empty = piece.tile_begin >= piece.tile_end;
    if (!empty) {
      combine_rows<kRows>(smem.exchange[turn], sum, [](float a, float b) { return a + b; });
      turn ^= 1;
    }
    if (threadIdx.x < 4) {
      if (!empty) {
        mbarrier_wait(smem_address(&smem.sums_empty), sums_parity);
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i)
          smem.inverse_sum[query_row(i)] = inverse_of_sum(sum[i]);
        mbarrier_arrive(smem_address(&smem.sums_full));
      }
      store_lse<kRows>(args, smem.row_tile, reference, sum, piece.partial(),
                       result_index(piece, blockIdx.z, sequence));
    }
    sums_parity ^= !empty;
    __syncwarp();
  }
}

}  // namespace flashmla::sm90::dense_decode::narrow
