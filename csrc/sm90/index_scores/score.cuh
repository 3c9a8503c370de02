// The scoring warpgroups take tiles in turn, so that the tensor cores work for one while others
// weigh and sum.
#pragma once

#include <cmath>
#include <type_traits>

#include "sm90/index_scores/keys.cuh"
#include "sm90/ptx/barrier.cuh"

namespace flashmla::sm90::index_scores {

// NaN stays NaN.
__device__ __forceinline__ float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// Of a product a thread holds rows lane / 4 (m = 0) and 8 below (m = 1), and of every 8 columns
// 2 (lane % 4) and the next. sums[q][m]: of query token q over the thread's heads.
template <int kHeads, int kQueries>
__device__ __forceinline__ void weigh(const float (&d)[kHeads * kQueries / 2],
                                      const float2 (&weights)[kHeads * kQueries / 8],
                                      float (&sums)[kQueries][2]) {
  constexpr int kGroups = kHeads / 8;
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float even = 0, odd = 0;
#pragma unroll
      for (int i = q * kGroups; i < (q + 1) * kGroups; ++i) {
        even = fmaf(relu(d[i * 4 + m * 2]), weights[i].x, even);
        odd = fmaf(relu(d[i * 4 + m * 2 + 1]), weights[i].y, odd);
      }
      sums[q][m] = even + odd;
    }
  }
}

// Sums over a quad. Lane t of it gets row t % 2 of query tokens t / 2, t / 2 + 2 ...; of a single
// query token all lanes get its sums.
template <int kQueries>
__device__ __forceinline__ void sum_quad(const float (&sums)[kQueries][2],
                                         float (&sum)[(kQueries + 1) / 2]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  float rows[kQueries];
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    const float sent = odd ? sums[q][0] : sums[q][1];
    rows[q] = (odd ? sums[q][1] : sums[q][0]) + __shfl_xor_sync(~0u, sent, 1);
  }
  if constexpr (kQueries == 1) {
    sum[0] = rows[0] + __shfl_xor_sync(~0u, rows[0], 2);
  } else {
#pragma unroll
    for (int k = 0; k < kQueries / 2; ++k) {
      const float sent = upper ? rows[2 * k] : rows[2 * k + 1];
      sum[k] = (upper ? rows[2 * k + 1] : rows[2 * k]) + __shfl_xor_sync(~0u, sent, 2);
    }
  }
}

// Where this thread's scores of an item go.
struct Rows {
  float* scores;  // of the item's first query token, and the thread's row of tile 0
  int64_t max_tokens;
  int row;      // of a tile
  int queries;  // of the item
  int seen;     // tokens that the first query sees
  bool causal;

  __device__ __forceinline__ Rows(const KernelArgs& args, const Item& item)
      : max_tokens(int64_t{args.max_blocks} * kTileTokens),
        queries(item.queries),
        seen(item.seen),
        causal(args.causal) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps;
    row = warp * 16 + lane / 4 + lane % 2 * 8;
    const int64_t query =
        int64_t{item.sequence} * args.queries + item.first_query - args.first_query;
    scores = args.scores + query * max_tokens + row;
  }

  // Of kQueries of the item's query tokens, from `first` on.
  template <int kQueries>
  __device__ __forceinline__ void store(const float (&sums)[kQueries][2], int first, int tile,
                                        float scale, bool visible) const {
    float sum[(kQueries + 1) / 2];
    sum_quad(sums, sum);
    const int lane = threadIdx.x % 32;
    const int mine = first + (kQueries > 1 ? lane % 4 / 2 : 0);  // and every other one
    const bool stores = kQueries > 1 || lane % 4 < 2;
    const int token = tile * kTileTokens + row;
#pragma unroll
    for (int k = 0; k < (kQueries + 1) / 2; ++k) {
      const int q = mine + 2 * k;
      const bool is_seen = visible && token < seen + (causal ? q : 0);
      if (stores && q < queries) {
        scores[q * max_tokens + int64_t{tile} * kTileTokens] = is_seen ? sum[k] * scale : -INFINITY;
      }
    }
  }
};

// visit(0), visit(1) ... with constants.
template <int kParts, int kPart = 0, typename Visit>
__device__ __forceinline__ void for_each_part(const Visit& visit) {
  visit(std::integral_constant<int, kPart>{});
  if constexpr (kPart + 1 < kParts) for_each_part<kParts, kPart + 1>(visit);
}

template <bool kFp8, int kHeads, int kQueries>
__device__ void run_scores(const KernelArgs& args, SharedStorage<kFp8, kHeads, kQueries>& smem,
                           int warpgroup) {
  using Plan = index_scores::Plan<kFp8, kHeads * kQueries>;
  constexpr int kN = kHeads * kQueries, kStages = Plan::kStages, kWarpgroups = Plan::kWarpgroups;
  constexpr int kParts = Plan::kParts, kPartN = kN / kParts, kPartQueries = kQueries / kParts;
  const int lane = threadIdx.x % 32;
  uint32_t tiles = 0;  // of the items before
  for (uint32_t turn = 0;; ++turn) {
    const int buffer = turn & 1;
    mbarrier_wait(smem_address(&smem.queries_full[buffer]), turn >> 1 & 1);
    const Item item = smem.items[buffer];
    if (item.sequence < 0) return;
    float2 weights[kParts][kPartN / 8];
#pragma unroll
    for (int i = 0; i < kN / 8; ++i) {
      weights[i * 8 / kPartN][i % (kPartN / 8)] =
          *reinterpret_cast<const float2*>(&smem.weights[buffer][i * 8 + lane % 4 * 2]);
    }
    const Rows rows(args, item);
    const int count = item.tile_end - item.tile_begin;
    const int first =
        (warpgroup + kWarpgroups - static_cast<int>(tiles % kWarpgroups)) % kWarpgroups;
    for (int i = first; i < count; i += kWarpgroups) {
      const uint32_t slot = (tiles + i) % kStages;
      mbarrier_wait(smem_address(&smem.keys_full[slot]), (tiles + i) / kStages & 1);
      float d[kParts][kPartN / 2], sums[kPartQueries][2];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        multiply_tile<kFp8>(d[part], smem.keys[slot], &smem.queries[buffer][part * kPartN * 128]);
      }
      const float scale = smem.scales[slot][rows.row];
      const bool visible = smem.visible[slot];
      for_each_part<kParts>([&](auto part) {
        wgmma_wait<kParts - 1 - part>();
        pin_registers(d[part]);
        if (part == kParts - 1 && lane == 0) mbarrier_arrive(smem_address(&smem.keys_empty[slot]));
        weigh<kHeads, kPartQueries>(d[part], weights[part], sums);
        rows.store(sums, part * kPartQueries, item.tile_begin + i, scale, visible);
      });
    }
    tiles += count;
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem_address(&smem.queries_empty[buffer]));
  }
}

}  // namespace flashmla::sm90::index_scores
