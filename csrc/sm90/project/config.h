// Sizes of project's kernel.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params/project.h"

namespace flashmla::sm90::project {

constexpr int kPart = 64;   // columns of y that one instruction makes
constexpr int kDepth = 64;  // weights of a column in a stage
constexpr int kMaxRows = 128;
constexpr int kMaxSplits = 8;       // thread blocks of a cluster, which share the sum over k
constexpr int kThreads = 128 + 32;  // a warpgroup of products, a warp of loads
constexpr int kPadding = 4;         // floats behind each row of the sums

constexpr int kPartBytes = kPart * kDepth * 2;
// A thread block makes `parts` times 64 columns: 256 or 512 bytes of a row of weights lie together,
// as memory wants to be read.
constexpr int stage_bytes(int rows, int parts) { return parts * kPartBytes + rows * kDepth * 2; }
// Two thread blocks fit a multiprocessor.
constexpr int stages_of(int rows, int parts) { return 108 * 1024 / stage_bytes(rows, parts); }
constexpr int sums_bytes(int rows, int parts) { return rows * (parts * kPart + kPadding) * 4; }

struct KernelArgs {
  CUtensorMap x_map, w_map[kMaxWeights];  // dims: columns, rows, groups; 1 in a fourth
  ProjectParams params;
  int tiles;                  // of all weights' columns
  int tiles_of[kMaxWeights];  // of each one's
  int steps;                  // stages that k takes
  int stages;                 // of the ring
};

}  // namespace flashmla::sm90::project
