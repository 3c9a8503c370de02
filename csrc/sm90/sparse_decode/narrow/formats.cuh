// What the kernel must know of a row format: where in a row its columns and scales are.
#pragma once

#include <cstdint>

namespace flashmla::sm90::sparse::narrow {

// 512 e4m3 codes; 4 f32 scales, one per 128 columns; 64 bf16 columns of rope.
struct V32 {
  static constexpr int kRowBytes = 656;
  static constexpr int kHeadDim = 576;
  static constexpr bool kRope = true;  // a chunk of 16-bit columns that are no values
  static constexpr int kScaleOffset = 512, kRopeOffset = 528;
  static constexpr int kScaleGroups = 4;
};

// Without the rope: d_qk = d_v = 512.
struct V32Nope {
  static constexpr int kRowBytes = 528;
  static constexpr int kHeadDim = 512;
  static constexpr bool kRope = false;
  static constexpr int kScaleOffset = 512, kRopeOffset = 528;
  static constexpr int kScaleGroups = 4;
};

}  // namespace flashmla::sm90::sparse::narrow
