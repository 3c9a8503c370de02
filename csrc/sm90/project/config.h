// Sizes of project's kernel.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params/project.h"

namespace flashmla::sm90::project {

constexpr int kTile = 64;    // columns of y of a thread block
constexpr int kDepth = 64;   // weights of a column in a stage
constexpr int kMaxRows = 128;
constexpr int kMaxSplits = 8;  // thread blocks of a cluster, which share the sum over k
constexpr int kThreads = 128 + 32;  // a warpgroup of products, a warp of loads
constexpr int kPadding = 4;         // floats behind each row of the sums

constexpr int kWeightBytes = kTile * kDepth * 2;
constexpr int row_bytes(int rows) { return rows * kDepth * 2; }
constexpr int stage_bytes(int rows) { return kWeightBytes + row_bytes(rows); }
// Two thread blocks fit a multiprocessor.
constexpr int stages_of(int rows) { return 96 * 1024 / stage_bytes(rows); }
constexpr int sums_bytes(int rows) { return rows * (kTile + kPadding) * 4; }

struct KernelArgs {
  CUtensorMap x_map, w_map[kMaxWeights];  // dims: columns, rows, groups; 1 in a fourth
  ProjectParams params;
  int tiles;                  // of all weights' columns
  int tiles_of[kMaxWeights];  // of each one's
  int steps;   // stages that k takes
  int stages;  // of the ring
};

}  // namespace flashmla::sm90::project
