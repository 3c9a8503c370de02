// The score warpgroup: S^T = K Q^T, whose 64 rows are a tile's tokens and whose columns are heads;
// softmax over the tokens; P^T for the value warpgroups. A warp has 16 tokens, a slot of the ring.
// Registers named by `i` belong to a thread's query rows.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/sparse_decode/narrow/keys.cuh"
#include "sm90/sparse_decode/narrow/query.cuh"
#include "sm90/sparse_decode/narrow/shared_storage.cuh"
#include "sm90/sparse_decode/softmax.cuh"
#include "sm90/sparse_decode/work.cuh"

namespace flashmla::sm90::sparse::narrow {

// Combines what all threads of the warpgroup have of a row. Ends with all warps having read.
template <int kRows, typename Combine>
__device__ __forceinline__ void combine_rows(float (&exchange)[kWarps][kRows],
                                             float (&x)[kThreadRows<kRows>], Combine combine) {
  const int thread = reread_thread();
#pragma unroll
  for (int lane = 4; lane <= 16; lane *= 2) {
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; ++i) {
      x[i] = combine(x[i], __shfl_xor_sync(~0u, x[i], lane));
    }
  }
  if (thread % 32 < 4) {
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; i += 2) {
      *reinterpret_cast<float2*>(&exchange[thread / 32][query_row(thread, i)]) = {x[i], x[i + 1]};
    }
  }
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    x[i] = combine(combine(exchange[0][query_row(thread, i)], exchange[1][query_row(thread, i)]),
                   combine(exchange[2][query_row(thread, i)], exchange[3][query_row(thread, i)]));
  }
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
}

// Moves references to a tile's largest scores, which `peak` has of this thread, and its sums
// with them. By what power of two the output is to be divided goes to `rescale`.
template <typename Format, int kRows>
__device__ __forceinline__ void raise_references(SharedStorage<Format, kRows>& smem,
                                                 float (&peak)[kThreadRows<kRows>],
                                                 uint8_t* rescale) {
  const int thread = reread_thread();
  combine_rows<kRows>(smem.exchange, peak, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    float moved = smem.reference[query_row(thread, i)];
    const int power = raise_reference(moved, peak[i]);
    reinterpret_cast<float*>(&smem.sums[i / 4][thread])[i % 4] *= rescale_factor(power);
    peak[i] = moved;
    if (thread < 4) rescale[query_row(thread, i)] = power;
  }
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);  // all have read the references
  if (thread < 4) {
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; ++i) {
      smem.reference[query_row(thread, i)] = peak[i];
      smem.offset[query_row(thread, i)] = finite_reference(peak[i]);
    }
  }
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
}

// Stores probabilities as wgmma's B operand: K-major rows of 64 tokens in the 128-byte swizzle.
template <int kRows>
__device__ __forceinline__ void store_probabilities(const float (&p)[kRows / 2], uint32_t target) {
  const int thread = reread_thread(), lane = thread % 32;
  const int matrix = lane / 8;  // tokens % 16 / 8, rows % 16 / 8
  const int piece = thread / 32 * 2 + matrix % 2;
#pragma unroll
  for (int rows = 0; rows < kRows; rows += 16) {
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = rows / 4 + j / 2 * 2;
      packed[j] = pack<__nv_bfloat16>(p[element(i, j % 2)], p[element(i + 1, j % 2)]);
    }
    store_matrix_x4_trans(target + swizzled_offset(rows + matrix / 2 * 8 + lane % 8, piece),
                          packed[0], packed[1], packed[2], packed[3]);
  }
}

// Softmax of a tile's scores s, which become probabilities. Returns whether references moved.
template <typename Format, int kRows>
__device__ __forceinline__ bool make_probabilities(SharedStorage<Format, kRows>& smem,
                                                   float (&s)[kRows / 2], uint32_t valid,
                                                   bool first, uint8_t* rescale) {
  constexpr int kMine = kThreadRows<kRows>;
  const int thread = reread_thread(), token = thread % 32 / 4;
  // Products and differences are rounded one by one, so that the largest of huge scores, less
  // itself, is 0.
  const int row = thread / 32 * kSlotTokens + token;
  const float scale[2] = {smem.score_scale[row], smem.score_scale[row + 8]};
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
#pragma unroll
    for (int m = 0; m < 2; ++m) s[element(i, m)] = __fmul_rn(s[element(i, m)], scale[m]);
  }
  if (valid != (1 << kSlotTokens) - 1) {
    const bool seen[2] = {(valid >> token & 1) != 0, (valid >> (token + 8) & 1) != 0};
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (!seen[m]) s[element(i, m)] = -INFINITY;
      }
    }
  }
  float peak[kMine], highest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    peak[i] = fmaxf(s[element(i, 0)], s[element(i, 1)]);
    highest = fmaxf(highest, peak[i] - smem.offset[query_row(thread, i)]);
  }
  const bool raise =
      named_barrier_any(kScoreBarrier, kWarpgroupThreads, first || highest > kLazyRescale);
  if (raise) raise_references<Format, kRows>(smem, peak, rescale);
#pragma unroll
  for (int i = 0; i < kMine; i += 4) {
    float4 sum = smem.sums[i / 4][thread];
    float* const sums = &sum.x;
#pragma unroll
    for (int j = i; j < i + 4; ++j) {
      const float offset = smem.offset[query_row(thread, j)];
      float(&low) = s[element(j, 0)], (&high) = s[element(j, 1)];
      low = exp2_approx(__fsub_rn(low, offset));
      high = exp2_approx(__fsub_rn(high, offset));
      sums[j - i] += low + high;
    }
    smem.sums[i / 4][thread] = sum;
  }
  return raise && !first;
}

// Ends a piece: its log-sum-exps, and the factors of its outputs. index: query token or, if
// partial, workspace slot. By the first four threads, which have all rows.
template <typename Format, int kRows>
__device__ __forceinline__ void finish_rows(const KernelArgs& args,
                                            SharedStorage<Format, kRows>& smem, HeadTile heads,
                                            const float (&sum)[kThreadRows<kRows>], bool partial,
                                            int index, uint32_t sums_parity) {
  mbarrier_wait(smem_address(&smem.sums_empty), sums_parity);
  const int thread = reread_thread();
  float* target = (partial ? args.lse_accum : args.lse) + int64_t{index} * args.h_q + heads.first;
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    const int row = query_row(thread, i);
    const float lse = row_lse_log2(smem.reference[row], sum[i]);
    float inverse = sum[i] > 0.0f ? reciprocal_approx(sum[i]) : 0.0f;
    if (row < heads.count) {
      target[row] = partial ? lse : lse * kLn2;
      if (!partial && args.attn_sink != nullptr && sum[i] > 0.0f) {
        inverse *= sink_share(lse, args.attn_sink[heads.first + row]);
      }
    }
    smem.inverse_sum[row] = inverse;
  }
  mbarrier_arrive(smem_address(&smem.sums_full));
}

__device__ __forceinline__ void store_empty_lse(const KernelArgs& args, HeadTile heads,
                                                bool partial, int index) {
  float* target = (partial ? args.lse_accum : args.lse) + int64_t{index} * args.h_q + heads.first;
  for (int row = reread_thread(); row < heads.count; row += kWarpgroupThreads)
    target[row] = -INFINITY;
}

template <typename Format, int kRows>
__device__ void run_scores(const KernelArgs& args, SharedStorage<Format, kRows>& smem) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  RingPosition<kStages> ring;
  BufferPosition buffer;  // of probabilities
  uint32_t sums_parity = 1;

  for (int query = smem.begin.sequence; owns_work(smem.begin, smem.end, query); ++query) {
    const HeadTile heads = HeadTile::of_block<kRows>(args);
    const Piece piece = piece_of(smem.begin, smem.end, query, load_length(args.main, query));
    const bool partial = piece.continued || piece.unfinished;
    const int index = partial ? piece_slot(blockIdx.y, piece.continued) : query;
    if (piece.tile_begin >= piece.tile_end) {
      store_empty_lse(args, heads, partial, index);
      continue;
    }
    // The warp that read the last piece's at its end; seen by all once the queries are taken.
    if (warp == 0) {
      for (int row = lane; row < kRows; row += 32) {
        smem.reference[row] = -INFINITY;
        smem.offset[row] = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows> / 4; ++i) smem.sums[i][threadIdx.x] = float4{};
    const int exponent = find_query_exponent(smem, heads.count, ring);
    take_query(smem, heads.count, power_of_two(-exponent), ring);
    const float score_scale = args.scale_log2 * power_of_two(exponent);

    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      mbarrier_wait(smem_address(&smem.full[ring.stage][warp]), ring.parity);
      const bool large_scales = named_barrier_any(kScoreBarrier, kWarpgroupThreads,
                                                  prepare_scales(smem, ring.stage, score_scale));
      float s[kRows / 2];
      compute_scores<Format, kRows>(s, smem, ring.stage);
      const uint32_t valid = smem.valid[ring.stage][warp];
      // Of the buffer's last round; passes at once in the first.
      mbarrier_wait(smem_address(&smem.probabilities_empty[buffer.slot()]), buffer.parity() ^ 1);
      const bool rescaled = make_probabilities<Format, kRows>(
          smem, s, valid, tile == piece.tile_begin, smem.rescale[buffer.slot()]);
      if (lane == 0) {
        smem.flags[buffer.slot()][warp] =
            (rescaled ? kRescaled : 0) | (large_scales ? kHasLargeScales : 0);
      }
      store_probabilities<kRows>(s, smem_address(smem.probabilities[buffer.slot()]));
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(smem_address(&smem.probabilities_full[buffer.slot()]));
      ring.advance();
      ++buffer.turn;
    }

    float sum[kThreadRows<kRows>];
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; ++i) {
      sum[i] = reinterpret_cast<const float*>(&smem.sums[i / 4][threadIdx.x])[i % 4];
    }
    combine_rows<kRows>(smem.exchange, sum, [](float a, float b) { return a + b; });
    if (threadIdx.x < 4) {
      finish_rows<Format, kRows>(args, smem, heads, sum, partial, index, sums_parity);
    }
    sums_parity ^= 1;
    __syncwarp();
  }
}

}  // namespace flashmla::sm90::sparse::narrow
