// Sizes of the kernel for few rows.
#pragma once

#include "params/project.h"

namespace flashmla::sm90::project::few {

constexpr int kMaxRows = 4;
// Warps of a thread block, which share its part of the sum over k. With two blocks a multiprocessor
// 64 KB are in flight there; twice as many are slower.
constexpr int kMaxWarps = 4;
constexpr int kMaxSplits = 8;          // thread blocks of a cluster, which share the sum over k
constexpr int kColumns = 64;           // of y that a thread block makes
constexpr int kLoads = 4;              // of 16 bytes a lane, from four rows or columns of weights
constexpr int kQuarters = 4;           // of kLoads each that a warp keeps in flight
constexpr int kDepth = 32;             // that k is a multiple of
constexpr int kPiece = 4;              // columns that a thread adds and stores
constexpr int kStride = kColumns + 4;  // floats between rows of the sums: banks apart

struct KernelArgs {
  ProjectParams params;
  int tiles;                  // of all weights' columns
  int tiles_of[kMaxWeights];  // of each one's
  int steps, block_steps;     // that k takes, and of each block of a cluster
  int share;                  // a block of a cluster stores 1 << share pieces
};

}  // namespace flashmla::sm90::project::few
