// The loading warps: tiles into the ring, in turn, and by the last one an item's queries and
// weights, which would keep the first tile waiting.
#pragma once

#include "sm90/index_scores/work.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::index_scores {

// Shows the scoring warpgroups the next item, once they are through with the one before the last.
template <typename Storage, int kHeads>
__device__ __forceinline__ void load_queries(const KernelArgs& args, Storage& smem,
                                             const Item& item, uint32_t turn) {
  const int buffer = turn & 1, lane = threadIdx.x % 32;
  const int64_t query = int64_t{item.sequence} * args.s_q + item.first_query;
  const uint32_t full = smem_address(&smem.queries_full[buffer]);
  float weights[Storage::kN / 32];
#pragma unroll
  for (int i = 0; i < Storage::kN / 32; ++i) {
    const int n = i * 32 + lane, head = n % kHeads;
    const bool exists = item.sequence >= 0 && n / kHeads < item.queries && head < args.heads;
    weights[i] = exists ? args.weights[(query + n / kHeads) * args.heads + head] : 0;
  }
  // In the first round this passes at once.
  mbarrier_wait(smem_address(&smem.queries_empty[buffer]), (turn >> 1 & 1) ^ 1);
  if (lane == 0 && item.sequence >= 0) {
    mbarrier_expect(full, Storage::kQueryBytes);
    tma_load_4d(smem_address(smem.queries[buffer]), &args.query_map, full, 0, 0,
                static_cast<int>(query), 0, kEvictNormal);
  }
#pragma unroll
  for (int i = 0; i < Storage::kN / 32; ++i) smem.weights[buffer][i * 32 + lane] = weights[i];
  if (lane == 0) smem.items[buffer] = item;
  __syncwarp();
  if (lane == 0) mbarrier_arrive(full);
}

// By one thread. A block outside the layer is not loaded: what the slot held is not used.
template <typename Storage>
__device__ __forceinline__ void load_tile(const KernelArgs& args, Storage& smem, int layer,
                                          int block, int slot) {
  const uint32_t full = smem_address(&smem.keys_full[slot]);
  const bool visible = static_cast<uint32_t>(block) < args.layer_blocks;
  smem.visible[slot] = visible;
  if (!visible) {
    mbarrier_arrive(full);
    return;
  }
  mbarrier_arrive_expect(full, kCodeBytes + kScaleBytes);
  tma_load_4d(smem_address(smem.keys[slot]), &args.key_map, full, 0, 0, layer + block, 0,
              args.key_hint);
  copy_bulk(smem_address(smem.scales[slot]),
            args.blocks + int64_t{layer + block} * args.block_bytes + kCodeBytes, kScaleBytes, full,
            args.key_hint);
}

template <typename Storage, int kHeads, int kQueries>
__device__ void run_loads(const KernelArgs& args, Storage& smem, int warp) {
  using Plan = typename Storage::Plan;
  const int lane = threadIdx.x % 32;
  Work<kQueries, Plan::kBlocks> work(args);
  const int64_t first = args.first_block == nullptr ? 0 : *args.first_block;
  const int layer = static_cast<int>(min(max(first, int64_t{0}), args.last_first_block));
  constexpr int kStages = Plan::kStages, kWarps = Plan::kLoadingWarps;
  uint32_t tiles = 0;
  for (uint32_t turn = 0;; ++turn) {
    const Item item = work.next();
    // A lane's of 32 tiles' blocks, and of the next 32.
    int next_blocks = item.sequence < 0 ? -1 : work.load_blocks(item, item.tile_begin);
    if (warp == kWarps - 1) load_queries<Storage, kHeads>(args, smem, item, turn);
    if (item.sequence < 0) return;
#pragma unroll 1
    for (int tile = item.tile_begin; tile < item.tile_end; tile += 32) {
      const int blocks = next_blocks, count = min(item.tile_end - tile, 32);
      next_blocks = tile + 32 < item.tile_end ? work.load_blocks(item, tile + 32) : -1;
#pragma unroll 1
      for (int i = 0; i < count; ++i, ++tiles) {
        if (kWarps > 1 && static_cast<int>(tiles % kWarps) != warp) continue;
        const int slot = tiles % kStages, block = __shfl_sync(~0u, blocks, i);
        // Of the slot's last round; passes at once in the first.
        mbarrier_wait(smem_address(&smem.keys_empty[slot]), (tiles / kStages & 1) ^ 1);
        if (lane == 0) load_tile(args, smem, layer, block, slot);
      }
    }
  }
}

}  // namespace flashmla::sm90::index_scores
