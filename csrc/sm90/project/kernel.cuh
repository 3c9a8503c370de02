// project: a thread block makes 64 columns of y for all rows, or a cluster of blocks does, each
// with a part of k. One warp loads weights and rows through TMA into a ring; a warpgroup multiplies
// y^T = W^T x^T, so that the columns fill the tensor cores' 64 rows however few rows x has.
#pragma once

#include <cstdint>

#include "elements.h"
#include "sm90/project/config.h"
#include "sm90/project/sums.cuh"
#include "sm90/project/tile.cuh"
#include "sm90/project/turn.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/ptx/warpgroup.h"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::project {

// Steps [begin, end) of the sum over k.
struct Steps {
  int begin, end;
};

// A place in the ring, and the parity of its barriers' phase.
struct Slot {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// The loads of a block's ring.
template <int kRows, bool kTransposed>
struct Loads {
  const KernelArgs& args;
  const CUtensorMap* w_map;
  uint32_t ring, full;
  Steps steps;
  int column, row0, group;

  __device__ __forceinline__ void load_weights(int turn, int stage) const {
    const int depth = (steps.begin + turn) * kDepth;
    const uint32_t barrier = full + 8 * stage;
    mbarrier_arrive_expect(barrier, stage_bytes(kRows));
    // Past the last column zeros are written.
    tma_load_4d(ring + stage * stage_bytes(kRows), w_map, barrier, kTransposed ? depth : column,
                kTransposed ? column : depth, group, 0, kEvictFirst);
  }

  __device__ __forceinline__ void load_rows(int turn, int stage) const {
    tma_load_4d(ring + stage * stage_bytes(kRows) + kWeightBytes, &args.x_map, full + 8 * stage,
                (steps.begin + turn) * kDepth, row0, group, 0, kEvictNormal);
  }

  // What the ring has room for, before the kernel that makes x has ended.
  __device__ __forceinline__ void load_first_weights() const {
    const int first = min(steps.end - steps.begin, args.stages);
    for (int turn = 0; turn < first; ++turn) load_weights(turn, turn);
  }

  __device__ __forceinline__ void load_rest(uint32_t empty) const {
    const int turns = steps.end - steps.begin, stages = args.stages, first = min(turns, stages);
    wait_for_prerequisites();
    for (int turn = 0; turn < first; ++turn) load_rows(turn, turn);
    Slot slot;
    for (int turn = stages; turn < turns; ++turn) {
      mbarrier_wait(empty + 8 * slot.stage, slot.parity);
      load_weights(turn, slot.stage);
      load_rows(turn, slot.stage);
      slot.advance(stages);
    }
  }
};

// d: this block's sums. A stage is free once the products of the next one have been started.
template <class T, int kRows, bool kTransposed>
__device__ __forceinline__ void multiply_stages(uint32_t ring, uint32_t full, uint32_t empty,
                                                int turns, int stages, float (&d)[kRows / 2]) {
  Slot slot;
  int before = 0;
  for (int turn = 0; turn < turns; ++turn) {
    mbarrier_wait(full + 8 * slot.stage, slot.parity);
    const uint32_t w = ring + slot.stage * stage_bytes(kRows), x = w + kWeightBytes;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      const uint64_t a = kTransposed ? k_major_desc(w) + 2 * i
                                     : mn_major_desc(w, kWeightBytes, kGroupBytes) + 128 * i;
      wgmma_ss<T, !kTransposed>(d, a, k_major_desc(x) + 2 * i, turn > 0 || i > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (turn > 0 && threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * before);
    before = slot.stage;
    slot.advance(stages);
  }
  wgmma_wait<0>();
  pin_registers(d);
}

// grid [(tiles + turning) * splits, groups, rows / kRows], clusters of splits.
template <class T, class Element, int kRows, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2)
    project_kernel(const __grid_constant__ KernelArgs args) {
  // The ring; then the block's sums [rows, kStride] float, and of each block of the cluster the
  // pieces stored by this one.
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint64_t full_barriers[kMaxStages], empty_barriers[kMaxStages], received_barrier;
  const int splits = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  const int number = static_cast<int>(blockIdx.x) / splits, group = static_cast<int>(blockIdx.y);
  const int row0 = static_cast<int>(blockIdx.z) * kRows;
  launch_dependents();
  if (number >= args.tiles) {
    wait_for_prerequisites();
    const int blocks = args.turning * splits * gridDim.z;
    const int block = ((number - args.tiles) * splits + rank) * gridDim.z + blockIdx.z;
    turn_columns<Element>(args.params, group, block * kThreads + threadIdx.x, blocks * kThreads);
    return;
  }
  const Tile tile = find_tile<kColumns>(args.params, args.tiles_of, number);
  const int rows = min(kRows, args.params.rows - row0);
  const Pieces pieces = {rows * kPieces, args.share, splits, rank};
  const uint32_t full = smem_address(full_barriers), empty = smem_address(empty_barriers);
  const uint32_t ring = smem_address(shared), received = smem_address(&received_barrier);
  const Steps steps = {args.steps * rank / splits, args.steps * (rank + 1) / splits};
  const Loads<kRows, kTransposed> loads{
      args, &args.w_map[tile.weight], ring, full, steps, tile.begin, row0, group};
  const bool loader = threadIdx.x == kWarpgroupThreads;
  if (loader) {
    prefetch_tensor_map(&args.w_map[tile.weight]);
    prefetch_tensor_map(&args.x_map);
    for (int stage = 0; stage < args.stages; ++stage) {
      mbarrier_init(full + 8 * stage, 1);
      mbarrier_init(empty + 8 * stage, kWarpgroupWarps);
    }
    mbarrier_init(received, 1);
    mbarrier_init_fence();
    loads.load_first_weights();
    mbarrier_arrive_expect(received, pieces.received_bytes());
  }
  __syncthreads();
  if (threadIdx.x >= kWarpgroupThreads) {
    if (loader) loads.load_rest(empty);
    return;
  }
  float d[kRows / 2];
  multiply_stages<T, kRows, kTransposed>(ring, full, empty, steps.end - steps.begin, args.stages,
                                         d);
  named_barrier_sync(1, kWarpgroupThreads);  // all that was loaded has been multiplied
  if (splits > 1) cluster_arrive();          // so what other blocks send may take the ring's place
  put_sums<kRows>(d, reinterpret_cast<float*>(shared));
  named_barrier_sync(1, kWarpgroupThreads);
  const auto store = [&](int piece, float4 sum) {
    store_piece<T, Element>(args.params, tile, row0, group, piece, sum);
  };
  if (splits > 1) cluster_wait();
  add_over_cluster(pieces, ring, ring + sums_bytes(kRows), received, store);
}

}  // namespace flashmla::sm90::project
