// Writes what is selected, in the order of positions.
#pragma once

#include "sm90/index_topk/threshold.cuh"

namespace flashmla::sm90::index_topk {

// A warp's share of the slice, a multiple of 32 tokens.
struct WarpShare {
  int begin, end;

  static __device__ WarpShare of(const Slice& slice) {
    const int share = (slice.count + 32 * kWarps - 1) / (32 * kWarps) * 32;
    const int begin = threadIdx.x / 32 * share;
    return {min(begin, slice.count), min(begin + share, slice.count)};
  }
};

__device__ __forceinline__ Counts operator+(Counts a, Counts b) {
  return {a.above + b.above, a.equal + b.equal};
}

__device__ __forceinline__ Counts sum_lanes(Counts x) {
  return {__reduce_add_sync(~0u, x.above), __reduce_add_sync(~0u, x.equal)};
}

// How many are selected where so many keys are above the threshold and equal to it.
__device__ __forceinline__ int selected_of(Counts counts, const Threshold& threshold) {
  return counts.above + min(counts.equal, threshold.equal);
}

__device__ __forceinline__ Counts count_share(const Slice& slice, const uint32_t* keys,
                                              WarpShare share, uint32_t threshold) {
  Counts counts{};
#pragma unroll 4
  for (int i = share.begin + threadIdx.x % 32; i < share.end; i += 32) {
    const uint32_t key = slice.key(keys, i);
    counts.above += key > threshold;
    counts.equal += key == threshold;
  }
  return sum_lanes(counts);
}

// Places a warp's selected tokens; `before`: counts of all earlier ones of the row, `first` the
// place of the block's first.
__device__ __forceinline__ void place_share(const Slice& slice, const uint32_t* keys,
                                            WarpShare share, const Threshold& threshold,
                                            Counts before, int first, int32_t* selected) {
  const int lane = threadIdx.x % 32;
  const uint32_t lower_lanes = (1u << lane) - 1;
#pragma unroll 2
  for (int base = share.begin; base < share.end; base += 32) {
    const int i = base + lane;
    const uint32_t key = i < share.end ? slice.key(keys, i) : 0;
    const bool is_above = key > threshold.key;
    const bool is_equal = i < share.end && key == threshold.key;
    const uint32_t above = __ballot_sync(~0u, is_above), equal = __ballot_sync(~0u, is_equal);
    const Counts mine = before + Counts{__popc(above & lower_lanes), __popc(equal & lower_lanes)};
    if (is_above || (is_equal && mine.equal < threshold.equal)) {
      selected[selected_of(mine, threshold) - first] = slice.begin + i;
    }
    before = before + Counts{__popc(above), __popc(equal)};
  }
}

// By all threads of the cluster. table: the row's.
__device__ __forceinline__ void write_selected(const KernelArgs& args, SharedStorage& smem,
                                               const Slice& slice, const uint32_t* keys,
                                               const Threshold& threshold, uint32_t blocks,
                                               const int32_t* table, int64_t out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t rank = blocks > 1 ? cluster_rank() : 0;
  const WarpShare share = WarpShare::of(slice);
  const Counts counts = count_share(slice, keys, share, threshold.key);
  if (lane == 0) smem.warp_counts[warp] = counts;
  __syncthreads();
  const Counts of_lane = lane < kWarps ? smem.warp_counts[lane] : Counts{};
  const Counts block = sum_lanes(of_lane);
  const Counts earlier_warps = sum_lanes(lane < warp ? of_lane : Counts{});
  if (blocks > 1) {
    if (threadIdx.x < blocks) {
      store_cluster(map_shared(smem_address(&smem.block_counts[rank]), threadIdx.x),
                    uint2{static_cast<uint32_t>(block.above), static_cast<uint32_t>(block.equal)});
    }
    cluster_sync();
  }
  Counts earlier{}, all = block;
  if (blocks > 1) {
    const Counts of_rank = lane < blocks ? smem.block_counts[lane] : Counts{};
    all = sum_lanes(of_rank);
    earlier = sum_lanes(lane < rank ? of_rank : Counts{});
  }
  const int first = selected_of(earlier, threshold);
  const int end = selected_of(earlier + block, threshold);
  const int count = selected_of(all, threshold);
  place_share(slice, keys, share, threshold, earlier + earlier_warps, first, smem.selected);
  __syncthreads();
  for (int i = first + threadIdx.x; i < end; i += kThreads) {
    const int token = smem.selected[i - first];
    args.indices[out + i] = table[token / 64] * 64 + token % 64;
    args.positions[out + i] = token;
  }
  for (int i = count + rank * kThreads + threadIdx.x; i < args.topk; i += blocks * kThreads) {
    args.indices[out + i] = -1;
    args.positions[out + i] = -1;
  }
}

}  // namespace flashmla::sm90::index_topk
