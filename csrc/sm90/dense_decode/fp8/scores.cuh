// The two score warpgroups, the sides, which take turns at tiles: while one has the softmax of its
// tile, the other multiplies. Rows of S^T are a tile's tokens, sixteen a warp; its columns are
// query rows.
#pragma once

#include "sm90/dense_decode/fp8/keys.cuh"
#include "sm90/dense_decode/fp8/load.cuh"
#include "sm90/dense_decode/fp8/query.cuh"
#include "sm90/dense_decode/fp8/softmax.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// Brings a side's sums to the references of the other side's tile before, whose probabilities are
// in `slot`. Afterwards the side may move references itself.
template <typename Format, int kRows>
__device__ __forceinline__ void follow_references(const SharedStorage<Format, kRows>& smem,
                                                  float (&sum)[kSums<kRows>], int slot) {
  if (*const_cast<const volatile uint32_t*>(&smem.raised[slot])) {
    rescale_sums<kRows>(sum, smem.rescale[slot]);
  }
}

// Ends a piece: log-sum-exps, and the factors of outputs. By score thread `row`.
template <typename Format, int kRows>
__device__ __forceinline__ void finish_row(const KernelArgs& args,
                                           SharedStorage<Format, kRows>& smem, int row,
                                           int sequence, uint32_t sums_parity) {
  float of_side[kSides];
#pragma unroll
  for (int side = 0; side < kSides; ++side) {
    const auto& warps = smem.warp_rows + side * kWarps;
    of_side[side] = (warps[0][row] + warps[1][row]) + (warps[2][row] + warps[3][row]);
  }
  const float sum = of_side[0] + of_side[1];  // whichever side had the piece's first tile
  mbarrier_wait(smem_address(&smem.sums_empty), sums_parity);
  const Piece piece = piece_of_tiles(smem.begin, smem.end, sequence, 0);
  float value_scale = 1.0f;
  if constexpr (!Format::kScales) value_scale = *args.kv_scale;
  if (row < smem.row_tile.count) {
    float* const target = args.lse_rows(result_index(piece, blockIdx.y, sequence), piece.partial());
    target[smem.row_tile.first + row] = row_lse(smem.reference[row], sum, piece.partial());
  }
  smem.inverse_sum[row] = inverse_of_sum(sum) * value_scale;
  mbarrier_arrive(smem_address(&smem.sums_full));
}

// The softmax of a tile's scores, not yet scaled, and what the value warps need of it. References
// are moved tile after tile: a side waits for its turn. left: tokens of the sequence from the
// tile's first on; first: of the piece.
template <typename Format, int kRows>
__device__ __forceinline__ void finish_tile(const KernelArgs& args,
                                            SharedStorage<Format, kRows>& smem,
                                            const Position<kRows>& at, float (&s)[kRows / 2],
                                            float (&sum)[kSums<kRows>],
                                            const TokenExponents& exponents, int left) {
  const int thread = reread_thread(), side = reread_side(), slot = at.buffer();
  const bool first = at.first();
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
    mask_tile<Format, kRows>(args, smem.row_tile.first, s, left);
  }
  // Of the buffer's last round; passes at once in the first.
  mbarrier_wait(smem_address(&smem.probabilities_empty[slot]), at.buffer_parity() ^ 1);
  bool large = false;
  if constexpr (Format::kScales) {
    large = store_scales<Format>(smem, at.stage(), slot, left);
  }
  named_barrier_sync(kTurnBarrier + side, kRoleThreads);
  float offset[kMine<kRows>], highest = -INFINITY;
  load_rows<kRows>(offset, smem.offset);
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) {
    highest = fmaxf(highest, fmaxf(s[element(i, 0)], s[element(i, 1)]) - offset[i]);
  }
  const bool raise =
      named_barrier_any(kScoreBarrier + side, kWarpgroupThreads, first || highest > kLazyRescale);
  if (!first) follow_references(smem, sum, slot ^ 1);
  if (raise) {
    float peak[kMine<kRows>];
#pragma unroll
    for (int i = 0; i < kMine<kRows>; ++i) peak[i] = fmaxf(s[element(i, 0)], s[element(i, 1)]);
    raise_references<kRows>(smem.warp_rows + side * kWarps, smem.reference, smem.offset, peak,
                            smem.rescale[slot]);
    rescale_sums<kRows>(sum, smem.rescale[slot]);
  }
  if (thread % kWarpgroupThreads == 0) smem.raised[slot] = raise && !first;
  load_rows<kRows>(offset, smem.offset);  // again: registers are few
#pragma unroll
  for (int i = 0; i < kMine<kRows>; ++i) {
#pragma unroll
    for (int m = 0; m < 2; ++m) s[element(i, m)] = __fsub_rn(s[element(i, m)], offset[i]);
  }
  pin_registers(s);  // offsets have been read
  named_barrier_arrive(kTurnBarrier + (side ^ 1), kRoleThreads);
  make_probabilities<kRows>(s);
  if (thread % 32 == 0) {
    smem.flags[slot][thread / 32 % kWarps] =
        (raise && !first ? kRescaled : 0) | (large ? kHasLargeScales : 0);
  }
  store_probabilities<typename Format::Value, kRows>(s, smem_address(smem.probabilities[slot]));
  fence_async_proxy();
  __syncwarp();
  if (thread % 32 == 0) mbarrier_arrive(smem_address(&smem.probabilities_full[slot]));
  add_to_sums<kRows>(sum, s);
}

template <typename Format, int kRows>
__device__ void run_scores(const KernelArgs& args, SharedStorage<Format, kRows>& smem) {
  Position<kRows> at;
  const auto copy_next_query = [&](int sequence) {
    if (owns_work(smem.begin, smem.end, sequence)) copy_query(args, smem, sequence);
  };

  copy_next_query(smem.begin.sequence);
  if (reread_side() == 1) named_barrier_arrive(kTurnBarrier, kRoleThreads);  // side 0 begins
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
    // By the threads that read the last piece's at its end; seen by all once the queries are there.
    if (threadIdx.x < kRows) {
      smem.reference[threadIdx.x] = -INFINITY;
      smem.offset[threadIdx.x] = 0.0f;
    }
    if (threadIdx.x == 0) smem.last_left = seqlen - (piece.tile_end - 1) * kTileTokens;
    take_query(args, smem, sequence);
    float sum[kSums<kRows>] = {};

    for (; tiles > 0; --tiles) {
      if (at.buffer() == reread_side()) {
        mbarrier_wait(smem_address(&smem.full[at.stage()]), at.ring_parity());
        TokenExponents exponents{};
        if constexpr (Format::kScales) {
          exponents = find_exponents<Format>(smem_address(smem.ring[at.stage()]));
        }
        float s[kRows / 2];
        compute_scores<Format, kRows>(s, smem, at.stage(), exponents);
        finish_tile(args, smem, at, s, sum, exponents, smem.last_left + (tiles - 1) * kTileTokens);
        const uint32_t tile = at.tile();
        if (tile % kPlanStep == 0 && tile > 0 && is_planner()) plan_tiles(args, smem, tile);
      }
      at.next_tile();
    }

    named_barrier_sync(kPairBarrier, kRoleThreads);  // no products are under way
    copy_next_query(sequence + 1);
    // The side that did not have the last tile. (Its sums may be zeros, of no tile.)
    if (at.buffer() == reread_side()) follow_references(smem, sum, at.buffer() ^ 1);
#pragma unroll
    for (int j = 0; j < kSums<kRows>; ++j) {
      smem.warp_rows[threadIdx.x / 32][sum_row<kRows>(threadIdx.x % 32, j)] = sum[j];
    }
    named_barrier_sync(kPairBarrier, kRoleThreads);  // sums are there
    if (threadIdx.x < kRows) {
      finish_row(args, smem, threadIdx.x, sequence, at.sums_parity() ^ 1);
    }
    at.next_piece();
    __syncwarp();
  }
  // The last turn was given to a side that has no more tiles.
  if (at.buffer() == reread_side()) named_barrier_sync(kTurnBarrier + at.buffer(), kRoleThreads);
}

}  // namespace flashmla::sm90::dense_decode::fp8
