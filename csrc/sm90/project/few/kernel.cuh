// project for few rows: a thread block makes 64 columns of y, or a cluster of blocks does, each
// with a part of k. Its warps share that part, and nothing but sums goes through shared memory.
#pragma once

#include <cstdint>

#include "elements.h"
#include "sm90/project/few/config.h"
#include "sm90/project/few/ring.cuh"
#include "sm90/project/sums.cuh"
#include "sm90/project/tile.cuh"
#include "sm90/project/turn.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"

namespace flashmla::sm90::project::few {

// This warp's sums, to sums[warp][row][column].
__device__ __forceinline__ void put_sums(const float (&d)[4][4], int rows, float* sums) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + i;
    if (row >= rows) continue;
    auto* to = reinterpret_cast<float4*>(sums + (warp * rows + row) * kStride + 8 * g);
    to[0] = {d[0][i], d[0][2 + i], d[1][i], d[1][2 + i]};
    to[1] = {d[2][i], d[2][2 + i], d[3][i], d[3][2 + i]};
  }
}

// The sum of 16 bytes each at `at` and every `stride` bytes from there, in their order.
template <int kMost>
__device__ __forceinline__ float4 add_pieces(uint32_t at, int stride, int count) {
  uint4 v[kMost] = {};
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (i < count) v[i] = load_shared(at + i * stride);
  }
  float4 sum = {};
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    sum.x += __uint_as_float(v[i].x), sum.y += __uint_as_float(v[i].y);
    sum.z += __uint_as_float(v[i].z), sum.w += __uint_as_float(v[i].w);
  }
  return sum;
}

// grid [splits, tiles + 1 where columns are rotated, groups], clusters of splits.
template <class T, class Element, bool kTransposed>
__global__ void __launch_bounds__(kMaxWarps * 32, 4)
    project_few_kernel(const __grid_constant__ KernelArgs args) {
  // [warps, rows, kStride] float, then of each block of the cluster the pieces stored by this one
  extern __shared__ __align__(16) float sums[];
  __shared__ uint64_t received_barrier;
  const ProjectParams& params = args.params;
  const int splits = gridDim.x, rank = blockIdx.x, group = blockIdx.z;
  const int threads = blockDim.x, warps = threads / 32;
  launch_dependents();
  if (blockIdx.y == args.tiles) {
    wait_for_prerequisites();
    turn_columns<Element>(params, group, rank * threads + threadIdx.x, splits * threads);
    return;
  }
  const Tile tile = find_tile<kColumns>(params, args.tiles_of, blockIdx.y);
  const int first = args.block_steps * rank + threadIdx.x / 32;
  const int end = min(args.block_steps * (rank + 1), args.steps);
  const int pieces = params.rows * kPieces, share = 1 << args.share;
  const int own = min(share, pieces - rank * share);  // not above 0 where others store all
  const uint32_t barrier = smem_address(&received_barrier);

  Ring<T, kTransposed> ring(params, tile, group, first, warps);
  ring.load_first_weights(first, end, warps);
  if (splits > 1) {
    if (threadIdx.x == 0) {
      mbarrier_init(barrier, 1);
      mbarrier_init_fence();
      mbarrier_arrive_expect(barrier, max(own, 0) * splits * 16);
    }
    cluster_arrive_relaxed();
  }
  wait_for_prerequisites();  // for x
  ring.load_first_rows(first, end, warps);
  float d[4][4] = {};
  ring.multiply(first, end, warps, d);
  put_sums(d, params.rows, sums);
  __syncthreads();

  const auto store = [&](int piece, float4 sum) {
    store_piece<T, Element>(params, tile, 0, group, piece, sum);
  };
  const uint32_t received = smem_address(sums) + warps * params.rows * kStride * 4;
  if (splits > 1) cluster_wait();  // for all blocks' barriers
#pragma unroll 1
  for (int piece = threadIdx.x; piece < pieces; piece += threads) {
    const int row = piece / kPieces, column = piece % kPieces * kPiece;
    const float4 sum = add_pieces<kMaxWarps>(smem_address(sums) + (row * kStride + column) * 4,
                                             params.rows * kStride * 4, warps);
    if (splits == 1) {
      store(piece, sum);
      continue;
    }
    const int owner = piece >> args.share, at = rank * share + (piece & (share - 1));
    const uint4 bits = {__float_as_uint(sum.x), __float_as_uint(sum.y), __float_as_uint(sum.z),
                        __float_as_uint(sum.w)};
    store_async(map_shared(received + at * 16, owner), bits, map_shared(barrier, owner));
  }
  // A block that stores nothing is sent nothing, and may leave.
  if (splits == 1 || static_cast<int>(threadIdx.x) >= own) return;
  mbarrier_wait(barrier, 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < own; i += threads) {
    store(rank * share + i, add_pieces<kMaxSplits>(received + i * 16, share * 16, splits));
  }
}

}  // namespace flashmla::sm90::project::few
