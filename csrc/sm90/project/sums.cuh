// Sums of a tile's columns from a warpgroup's registers, over the blocks of a cluster, to y. A
// piece is four columns of a row.
#pragma once

#include <cstdint>

#include "params/project.h"
#include "sm90/project/config.h"
#include "sm90/project/tile.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/warpgroup.h"

namespace flashmla::sm90::project {

// Who stores which pieces of a tile: each block of the cluster 1 << share, the last ones fewer.
struct Pieces {
  int count, share, splits, rank;

  // That this block stores: not above 0 where others store all.
  __device__ __forceinline__ int own() const {
    return splits == 1 ? count : min(1 << share, count - (rank << share));
  }
  __device__ __forceinline__ uint32_t received_bytes() const {
    return splits == 1 ? 0 : max(own(), 0) * splits * 16;
  }
};

// d of y^T [64 columns, kRows] to sums[row][column].
template <int kRows>
__device__ __forceinline__ void put_sums(const float (&d)[kRows / 2], float* sums) {
  const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
    float* to = sums + (j * 8 + lane % 4 * 2) * kStride + column;
    to[0] = d[4 * j];
    to[kStride] = d[4 * j + 1];
    to[8] = d[4 * j + 2];
    to[kStride + 8] = d[4 * j + 3];
  }
}

__device__ __forceinline__ float4 as_floats(uint4 v) {
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

template <class T, class Element>
__device__ __forceinline__ void store_piece(const ProjectParams& params, const Tile& tile, int row0,
                                            int group, int piece, float4 sum) {
  const int row = row0 + piece / kPieces, column = piece % kPieces * kPiece;
  if (column >= tile.count) return;
  const ProjectOutput& out = params.out[tile.weight];
  const int64_t at = (int64_t{row} * params.groups + group) * out.stride + tile.begin + column;
  *reinterpret_cast<uint2*>(static_cast<Element*>(out.y) + at) = {pack<T>(sum.x, sum.y),
                                                                  pack<T>(sum.z, sum.w)};
}

// store(piece, its sum over the blocks in their order), each piece in one block. A block that
// stores nothing is sent nothing, and may leave.
template <class Store>
__device__ __forceinline__ void add_over_cluster(const Pieces& pieces, uint32_t sums,
                                                 uint32_t received, uint32_t barrier,
                                                 const Store& store) {
  const int share = 1 << pieces.share, own = pieces.own();
#pragma unroll 4
  for (int i = threadIdx.x; i < pieces.count; i += kWarpgroupThreads) {
    const uint4 bits = load_shared(sums + (i / kPieces * kStride + i % kPieces * kPiece) * 4);
    if (pieces.splits == 1) {
      store(i, as_floats(bits));
      continue;
    }
    const int owner = i >> pieces.share, at = pieces.rank * share + (i & (share - 1));
    store_async(map_shared(received + at * 16, owner), bits, map_shared(barrier, owner));
  }
  if (pieces.splits == 1 || static_cast<int>(threadIdx.x) >= own) return;
  mbarrier_wait(barrier, 0);
#pragma unroll 1
  for (int i = threadIdx.x; i < own; i += kWarpgroupThreads) {
    uint4 v[kMaxSplits] = {};
#pragma unroll
    for (int block = 0; block < kMaxSplits; ++block) {
      if (block < pieces.splits) v[block] = load_shared(received + (block * share + i) * 16);
    }
    float4 sum = {};
#pragma unroll
    for (int block = 0; block < kMaxSplits; ++block) {
      const float4 part = as_floats(v[block]);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    store(pieces.rank * share + i, sum);
  }
}

}  // namespace flashmla::sm90::project
