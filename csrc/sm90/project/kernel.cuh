// project: a thread block makes 128 or 256 columns of y for all rows, or a cluster of blocks does,
// each with a part of k. One warp loads weights and rows through TMA into a ring; a warpgroup
// multiplies y^T = W^T x^T, so that the columns fill the tensor cores' 64 rows however few rows x
// has.
#pragma once

#include <cstdint>

#include "elements.h"
#include "sm90/project/config.h"
#include "sm90/project/tile.cuh"
#include "sm90/project/turn.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/tma.cuh"
#include "sm90/ptx/warpgroup.h"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::project {

constexpr int kMaxStages = stages_of(16, 2);

// Steps [begin, end) of the sum over k.
struct Steps {
  int begin, end;
};

// The loads of a block's ring. Weights of the first round are asked for before the kernel that
// makes x has ended.
template <int kRows, int kParts>
struct Loads {
  const KernelArgs& args;
  const CUtensorMap* w_map;
  uint32_t ring, full;
  Steps steps;
  int column, group;

  static constexpr int kStageBytes = stage_bytes(kRows, kParts);

  __device__ __forceinline__ void load_weights(int turn) const {
    const int stage = turn % args.stages, depth = (steps.begin + turn) * kDepth;
    const uint32_t to = ring + stage * kStageBytes, barrier = full + 8 * stage;
    const bool transposed = args.params.transposed;
    mbarrier_arrive_expect(barrier, kStageBytes);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {  // past the last column zeros are written
      const int at = column + part * kPart;
      tma_load_4d(to + part * kPartBytes, w_map, barrier, transposed ? depth : at,
                  transposed ? at : depth, group, 0, kEvictFirst);
    }
  }

  __device__ __forceinline__ void load_rows(int turn) const {
    const int stage = turn % args.stages, depth = (steps.begin + turn) * kDepth;
    tma_load_4d(ring + stage * kStageBytes + kParts * kPartBytes, &args.x_map, full + 8 * stage,
                depth, 0, group, 0, kEvictNormal);
  }
};

template <int kRows, int kParts>
__device__ __forceinline__ void load_stages(const Loads<kRows, kParts>& loads, uint32_t empty) {
  const int turns = loads.steps.end - loads.steps.begin, stages = loads.args.stages;
  for (int turn = 0; turn < min(turns, stages); ++turn) loads.load_weights(turn);
  wait_for_prerequisites();
  for (int turn = 0; turn < min(turns, stages); ++turn) loads.load_rows(turn);
  for (int turn = stages; turn < turns; ++turn) {
    mbarrier_wait(empty + 8 * (turn % stages), (turn / stages & 1) ^ 1);
    loads.load_weights(turn);
    loads.load_rows(turn);
  }
}

// sums[row][column] of this block's part of k.
template <class T, int kRows, int kParts, bool kTransposed>
__device__ __forceinline__ void multiply_stages(const KernelArgs& args, uint32_t ring,
                                                uint32_t full, uint32_t empty, Steps steps,
                                                float* sums) {
  constexpr int kStageBytes = stage_bytes(kRows, kParts);
  constexpr int kN = kRows < 32 ? 16 : 32;  // rows of one instruction
  float d[kParts][kRows / kN][kN / 2];
  for (int step = steps.begin, turn = 0; step < steps.end; ++step, ++turn) {
    const int stage = turn % args.stages;
    mbarrier_wait(full + 8 * stage, turn / args.stages & 1);
    const uint32_t w = ring + stage * kStageBytes, x = w + kParts * kPartBytes;
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t columns = w + part * kPartBytes;
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i) {
        const uint64_t a = kTransposed ? k_major_desc(columns) + 2 * i
                                       : mn_major_desc(columns, kPartBytes, kGroupBytes) + 128 * i;
#pragma unroll
        for (int n = 0; n < kRows / kN; ++n) {
          wgmma_ss<T, !kTransposed>(d[part][n], a, k_major_desc(x + n * kN * 128) + 2 * i,
                                    turn > 0 || i > 0);
        }
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * stage);
  }
  // All that was loaded has been multiplied: the sums may take the ring's place.
  named_barrier_sync(1, kWarpgroupThreads);
  constexpr int kStride = kParts * kPart + kPadding;
  const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int n = 0; n < kRows / kN; ++n) {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const int row = n * kN + j * 8 + lane % 4 * 2;
        float* to = sums + row * kStride + part * kPart + column;
        const float* from = d[part][n] + 4 * j;
        to[0] = from[0];
        to[kStride] = from[1];
        to[8] = from[2];
        to[kStride + 8] = from[3];
      }
    }
  }
}

// Adds the cluster's sums in the order of its blocks, each block its share of y.
template <class Element, int kParts>
__device__ __forceinline__ void store_sums(const KernelArgs& args, uint32_t sums, int splits,
                                           int rank, const Tile& tile, int group) {
  constexpr int kPiece = 4, kPieces = kParts * kPart / kPiece;
  const ProjectParams& params = args.params;
  const int64_t stride = params.n + params.rope;
  Element* y = static_cast<Element*>(params.y) + group * stride + tile.to;
  for (int i = rank * kThreads + threadIdx.x; i < params.rows * kPieces; i += splits * kThreads) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    if (column >= tile.count) continue;
    const uint32_t at = sums + (row * (kParts * kPart + kPadding) + column) * 4;
    float sum[kPiece] = {};
    for (int block = 0; block < splits; ++block) {
      const float4 v = load_cluster_float4(map_shared(at, block));
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
    Element* to = y + int64_t{row} * params.groups * stride + column;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      if (column + j < tile.count) to[j] = Element::from_float(sum[j]);
    }
  }
}

// grid [(tiles + 1 where columns are rotated) * splits, groups], clusters of splits.
template <class T, class Element, int kRows, int kParts, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2)
    project_kernel(const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) char ring[];
  __shared__ uint64_t full_barriers[kMaxStages], empty_barriers[kMaxStages];
  const int splits = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
  const int number = static_cast<int>(blockIdx.x) / splits, group = static_cast<int>(blockIdx.y);
  launch_dependents();
  if (number == args.tiles) {
    wait_for_prerequisites();
    turn_columns<Element>(args.params, group, rank * kThreads + threadIdx.x, splits * kThreads);
    return;
  }
  const uint32_t full = smem_address(full_barriers), empty = smem_address(empty_barriers);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < args.stages; ++stage) {
      mbarrier_init(full + 8 * stage, 1);
      mbarrier_init(empty + 8 * stage, kWarpgroupWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  const Tile tile = find_tile<kParts * kPart>(args.params, args.tiles_of, number);
  const Steps steps = {args.steps * rank / splits, args.steps * (rank + 1) / splits};
  auto* sums = reinterpret_cast<float*>(ring);
  if (threadIdx.x < kWarpgroupThreads) {
    multiply_stages<T, kRows, kParts, kTransposed>(args, smem_address(ring), full, empty, steps,
                                                   sums);
  } else if (threadIdx.x == kWarpgroupThreads) {
    load_stages<kRows, kParts>(
        {args, &args.w_map[tile.weight], smem_address(ring), full, steps, tile.begin, group},
        empty);
  }
  cluster_sync();
  store_sums<Element, kParts>(args, smem_address(ring), splits, rank, tile, group);
  cluster_sync();  // no block leaves while another one reads its sums
}

}  // namespace flashmla::sm90::project
