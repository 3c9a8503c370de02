// The two score warpgroups, the sides. Each multiplies half of the columns for all query rows; then
// they exchange halves of their sums, and each has the softmax of half of the query rows. Rows of
// S^T are a tile's tokens, sixteen a warp; its columns are query rows.
#pragma once

#include "sm90/dense_decode/fp8/keys.cuh"
#include "sm90/dense_decode/fp8/query.cuh"
#include "sm90/dense_decode/fp8/softmax.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// Adds to the side's own rows, the first half of s, what the other side has of them. The second
// half is the other side's. mine, theirs: where either side leaves what the other is to take.
template <int kRows>
__device__ __forceinline__ void exchange_sums(const float (&s)[kRows / 2],
                                              float (&own)[kRows / kSides / 2], uint32_t mine,
                                              uint32_t theirs) {
  constexpr int kHalf = kRows / kSides / 2;
  const int offset = reread_thread() % kWarpgroupThreads * 16;
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    store_shared(mine + i / 4 * (kWarpgroupThreads * 16) + offset,
                 {__float_as_uint(s[kHalf + i]), __float_as_uint(s[kHalf + i + 1]),
                  __float_as_uint(s[kHalf + i + 2]), __float_as_uint(s[kHalf + i + 3])});
  }
  named_barrier_sync(kPairBarrier, kRoleThreads);
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    const uint4 v = load_shared(theirs + i / 4 * (kWarpgroupThreads * 16) + offset);
    own[i] = s[i] + __uint_as_float(v.x);
    own[i + 1] = s[i + 1] + __uint_as_float(v.y);
    own[i + 2] = s[i + 2] + __uint_as_float(v.z);
    own[i + 3] = s[i + 3] + __uint_as_float(v.w);
  }
}

// Ends a piece: the side's log-sum-exps, and the factors of its outputs. By the side's first four
// threads, which have all its rows.
template <typename Format, int kRows>
__device__ __forceinline__ void finish_rows(const KernelArgs& args,
                                            SharedStorage<Format, kRows>& smem,
                                            const float (&sum)[kMine<kRows>], int sequence,
                                            uint32_t sums_parity) {
  mbarrier_wait(smem_address(&smem.sums_empty), sums_parity);
  const int thread = reread_thread(), side = reread_side();
  const Piece piece = piece_of_tiles(smem.begin, smem.end, sequence, 0);
  float* const target = args.lse_rows(result_index(piece, blockIdx.y, sequence), piece.partial()) +
                        smem.row_tile.first;
  float value_scale = 1.0f;
  if constexpr (!Format::kScales) value_scale = *args.kv_scale;
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) {
    const int row = side * (kRows / kSides) + query_row(thread, i);
    if (row < smem.row_tile.count) {
      target[row] = row_lse(smem.reference[row], sum[i], piece.partial());
    }
    smem.inverse_sum[row] = inverse_of_sum(sum[i]) * value_scale;
  }
  mbarrier_arrive(smem_address(&smem.sums_full));
}

// The softmax of a tile's scores, not yet scaled, of the side's own rows, and what the value
// warps need of it. left: tokens of the sequence from the tile's first on; first: of the piece.
template <typename Format, int kRows>
__device__ __forceinline__ void finish_tile(const KernelArgs& args,
                                            SharedStorage<Format, kRows>& smem,
                                            float (&s)[kRows / kSides / 2],
                                            float (&sum)[kMine<kRows>],
                                            const TokenExponents& exponents, int stage, int slot,
                                            int left, bool first) {
  constexpr int kOwnRows = kRows / kSides;
  const int thread = reread_thread(), first_row = reread_side() * kOwnRows;
  // Products and differences are rounded one by one, so that the largest of huge scores, less
  // itself, is 0.
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float scale = smem.score_scale;
      if constexpr (Format::kScales) scale *= power_of_two(exponents.of[m]);
      s[element(i, m)] = __fmul_rn(s[element(i, m)], scale);
    }
  }
  if (left - (args.causal ? args.s_q - 1 : 0) < kTileTokens) {
    mask_tile<Format, kRows>(args, smem.row_tile.first + first_row, s, left);
  }
  float peak[kMine<kRows>], highest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) {
    peak[i] = fmaxf(s[element(i, 0)], s[element(i, 1)]);
    highest = fmaxf(highest, peak[i] - smem.offset[first_row + query_row(thread, i)]);
  }
  // By both sides: afterwards nobody reads what was exchanged.
  const bool raise = named_barrier_any(kPairBarrier, kRoleThreads, first || highest > kLazyRescale);
  if (raise) {
    raise_references<kRows>(smem.warp_rows + reread_side() * kWarps, smem.reference + first_row,
                            smem.offset + first_row, peak, sum, smem.rescale[slot] + first_row);
  }
  make_probabilities<kRows>(smem.offset + first_row, s, sum);
  bool large = false;
  if constexpr (Format::kScales) {
    large = store_scales<Format>(smem, stage, slot, left);
  }
  if (thread % 32 == 0) {
    smem.flags[slot][thread / 32] =
        (raise && !first ? kRescaled : 0) | (large ? kHasLargeScales : 0);
  }
  store_probabilities<typename Format::Value, kRows>(
      s, smem_address(smem.probabilities[slot]) + first_row * kChunkRowBytes);
  fence_async_proxy();
  __syncwarp();
  if (thread % 32 == 0) mbarrier_arrive(smem_address(&smem.probabilities_full[slot]));
}

template <typename Format, int kRows>
__device__ void run_scores(const KernelArgs& args, SharedStorage<Format, kRows>& smem) {
  constexpr int kOwnRows = kRows / kSides;
  Position<kRows> at;
  const auto copy_next_query = [&](int sequence) {
    if (owns_work(smem.begin, smem.end, sequence)) copy_query(args, smem, sequence);
  };

  copy_next_query(smem.begin.sequence);
  for (int sequence = smem.begin.sequence; owns_work(smem.begin, smem.end, sequence); ++sequence) {
    const int seqlen = args.clamp_seqlen(args.cache_seqlens[opaque(sequence)]);
    const Piece piece = piece_of(smem.begin, smem.end, sequence, seqlen);
    int tiles = piece.tile_end - piece.tile_begin;
    if (tiles <= 0) {
      float* const target =
          args.lse_rows(result_index(piece, blockIdx.y, sequence), piece.partial()) +
          smem.row_tile.first;
      for (int row = threadIdx.x; row < smem.row_tile.count; row += kRoleThreads) {
        target[row] = -INFINITY;
      }
      asm volatile("cp.async.wait_all;" ::: "memory");
      copy_next_query(sequence + 1);
      continue;
    }
    // By the warp that read the last piece's at its end; seen by all once the queries are there.
    if (threadIdx.x % kWarpgroupThreads < kOwnRows && threadIdx.x % kWarpgroupThreads < 32) {
      const int row = reread_side() * kOwnRows + threadIdx.x % 32;
      smem.reference[row] = -INFINITY;
      smem.offset[row] = 0.0f;
    }
    if (threadIdx.x == 0) smem.last_left = seqlen - (piece.tile_end - 1) * kTileTokens;
    take_query(args, smem, sequence);
    float sum[kMine<kRows>] = {};

    for (; tiles > 0; --tiles) {
      mbarrier_wait(smem_address(&smem.full[at.stage()]), at.ring_parity());
      TokenExponents exponents{};
      if constexpr (Format::kScales) {
        exponents = find_exponents<Format>(smem_address(smem.ring[at.stage()]));
      }
      const int slot = at.buffer();
      float own[kRows / kSides / 2];
      {
        float s[kRows / 2];
        compute_scores<Format, kRows>(s, smem, at.stage(), exponents);
        // Of the buffer's last round; passes at once in the first.
        mbarrier_wait(smem_address(&smem.probabilities_empty[slot]), at.buffer_parity() ^ 1);
        const uint32_t one = smem_address(smem.exchange);
        const uint32_t two = smem_address(smem.probabilities[slot]);
        const bool side = reread_side() != 0;
        exchange_sums<kRows>(s, own, side ? two : one, side ? one : two);
      }
      const int left = smem.last_left + (tiles - 1) * kTileTokens;
      finish_tile(args, smem, own, sum, exponents, at.stage(), slot, left, at.first());
      at.next_tile();
    }

    copy_next_query(sequence + 1);
    combine_rows<kRows>(smem.warp_rows + reread_side() * kWarps, sum,
                        [](float a, float b) { return a + b; });
    if (threadIdx.x % kWarpgroupThreads < 4)
      finish_rows(args, smem, sum, sequence, at.sums_parity() ^ 1);
    at.next_piece();
    __syncwarp();
  }
}

}  // namespace flashmla::sm90::dense_decode::fp8
