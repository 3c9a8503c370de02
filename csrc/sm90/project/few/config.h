// Sizes of the kernel for few rows.
#pragma once

#include "params/project.h"

namespace flashmla::sm90::project::few {

constexpr int kMaxRows = 16;
constexpr int kMaxWarps = 4;   // of a thread block, which share its part of the sum over k
constexpr int kMaxSplits = 8;  // thread blocks of a cluster, which share the sum over k
// Warps of a multiprocessor: 8 KB in flight each. More are slower: with 16, 30 MB take 15.0 us
// instead of 13.3.
constexpr int kWarpsOfMultiprocessor = 8;
constexpr int kColumns = 64;  // of y that a thread block makes
constexpr int kLoads = 4;     // of 16 bytes a lane, from four rows or columns of weights
constexpr int kQuarters = 4;  // of kLoads each that a warp keeps in flight
constexpr int kDepth = 32;    // that k is a multiple of
constexpr int kPiece = 4;     // columns that a thread adds and stores
constexpr int kStride = kColumns + 4;  // floats between rows of the sums: banks apart

struct KernelArgs {
  ProjectParams params;
  int tiles;                  // of all weights' columns
  int tiles_of[kMaxWeights];  // of each one's
  int steps, block_steps;     // that k takes, and of each block of a cluster
  int share;                  // a block of a cluster stores 1 << share pieces
};

}  // namespace flashmla::sm90::project::few
