// What is selected of a row without a guess at its candidates: its scores are read up to five
// times.
#pragma once

#include "sm90/index_topk/threshold.cuh"
#include "sm90/index_topk/write.cuh"

namespace flashmla::sm90::index_topk {

// A warp's share of the slice, a multiple of 32 tokens.
struct WarpShare {
  int begin, end;

  static __device__ WarpShare of(const Slice& slice, int warps) {
    const int share = (slice.count + 32 * warps - 1) / (32 * warps) * 32;
    const int begin = threadIdx.x / 32 * share;
    return {min(begin, slice.count), min(begin + share, slice.count)};
  }
};

__device__ __forceinline__ Counts count_share(const Slice& slice, WarpShare share,
                                              float threshold) {
  Counts counts{};
#pragma unroll 4
  for (int i = share.begin + threadIdx.x % 32; i < share.end; i += 32) {
    const float score = slice.score(i);
    counts.above += score > threshold;
    counts.equal += score == threshold;
  }
  return sum_lanes(counts);
}

// Writes a warp's selected tokens; `before`: counts of all earlier ones of the row.
__device__ __forceinline__ void write_share(const Output& output, const Slice& slice,
                                            WarpShare share, const Threshold& threshold,
                                            Counts before) {
  const int lane = threadIdx.x % 32;
  const uint32_t lower_lanes = (1u << lane) - 1;
#pragma unroll 2
  for (int base = share.begin; base < share.end; base += 32) {
    const int i = base + lane;
    const float score = i < share.end ? slice.score(i) : NAN;
    const bool is_above = score > threshold.score, is_equal = score == threshold.score;
    const uint32_t above = __ballot_sync(~0u, is_above), equal = __ballot_sync(~0u, is_equal);
    const Counts mine = before + Counts{__popc(above & lower_lanes), __popc(equal & lower_lanes)};
    if (is_above || (is_equal && mine.equal < threshold.equal)) {
      output.write(selected_of(mine, threshold), slice.begin + i, slice.table[i / 64]);
    }
    before = before + Counts{__popc(above), __popc(equal)};
  }
}

// By all threads of the cluster; bins are clear. totals: as find_threshold says.
__device__ __forceinline__ void select_row(const Output& output, SharedStorage& smem,
                                           const Slice& slice, uint32_t* totals, uint32_t blocks) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t rank = cluster_rank();
  const Threshold threshold =
      find_threshold(smem, 0, 21, output.topk, blocks, totals, [&](const auto& visit) {
#pragma unroll 4
        for (int i = threadIdx.x; i < slice.count; i += kThreads) {
          if (const uint32_t key = key_of(slice.score(i))) visit(key);
        }
      });
  const WarpShare share = WarpShare::of(slice, kWarps);
  const Counts counts = count_share(slice, share, threshold.score);
  if (lane == 0) smem.warp_counts[warp] = counts;
  __syncthreads();
  const Counts of_lane = lane < kWarps ? smem.warp_counts[lane] : Counts{};
  Counts all = sum_lanes(of_lane), earlier = sum_lanes(lane < warp ? of_lane : Counts{});
  if (blocks > 1) {
    if (threadIdx.x < blocks) {
      store_cluster(map_shared(smem_address(&smem.block_counts[rank]), threadIdx.x),
                    uint2{static_cast<uint32_t>(all.above), static_cast<uint32_t>(all.equal)});
    }
    cluster_sync();
    const Counts of_rank = lane < blocks ? smem.block_counts[lane] : Counts{};
    all = sum_lanes(of_rank);
    earlier = earlier + sum_lanes(lane < rank ? of_rank : Counts{});
  }
  write_share(output, slice, share, threshold, earlier);
  output.fill(selected_of(all, threshold), rank * kThreads + threadIdx.x, blocks * kThreads);
}

}  // namespace flashmla::sm90::index_topk
