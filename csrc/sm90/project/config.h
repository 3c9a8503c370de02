// Sizes of project's kernel.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params/project.h"

namespace flashmla::sm90::project {

constexpr int kColumns = 64;  // of y that a thread block makes
constexpr int kDepth = 64;    // weights of a column in a stage
constexpr int kMaxRows = 128;
constexpr int kMaxSplits = 8;       // thread blocks of a cluster, which share the sum over k
constexpr int kThreads = 128 + 32;  // a warpgroup of products, a warp of loads
constexpr int kPiece = 4;           // columns that a thread adds and stores
constexpr int kPieces = kColumns / kPiece;
constexpr int kStride = kColumns + 4;  // floats between rows of the sums: banks apart
constexpr int kMaxStages = 14;
constexpr int kTurnedPairs = 2;  // that a thread rotates

constexpr int kWeightBytes = kColumns * kDepth * 2;
constexpr int stage_bytes(int rows) { return kWeightBytes + rows * kDepth * 2; }
// Bytes of a ring: four thread blocks fit a multiprocessor, two, or one and those of short sums.
constexpr int kShortRing = 52 * 1024, kRing = 104 * 1024, kLongRing = 144 * 1024;
constexpr int sums_bytes(int rows) { return rows * kStride * 4; }

struct KernelArgs {
  CUtensorMap x_map, w_map[kMaxWeights];  // dims: columns, rows, groups; 1 in a fourth
  ProjectParams params;
  int tiles;                  // of all weights' columns
  int tiles_of[kMaxWeights];  // of each one's
  int turning;                // clusters behind those of the tiles, which rotate
  int steps;                  // stages that k takes
  int stages;                 // of the ring
  int share;                  // a block of a cluster stores 1 << share pieces
};

}  // namespace flashmla::sm90::project
