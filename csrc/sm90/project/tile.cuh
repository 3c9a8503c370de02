// Which of the weights, side by side, a thread block's columns of y are.
#pragma once

#include "params/project.h"

namespace flashmla::sm90::project {

// Columns of one of the weights.
struct Tile {
  int weight, begin, count;
};

// tiles_of: tiles of kColumns columns that each of the weights has.
template <int kColumns>
__device__ __forceinline__ Tile find_tile(const ProjectParams& params,
                                          const int (&tiles_of)[kMaxWeights], int tile) {
  int weight = 0;
#pragma unroll
  for (int i = 0; i + 1 < kMaxWeights; ++i) {
    if (weight == i && tile >= tiles_of[i]) {
      tile -= tiles_of[i];
      ++weight;
    }
  }
  const int begin = tile * kColumns;
  return {weight, begin, min(kColumns, params.n_of[weight] - begin)};
}

}  // namespace flashmla::sm90::project
