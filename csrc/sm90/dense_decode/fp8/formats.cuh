// What the kernel must know of a row format, and in which type its values are multiplied.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flashmla::sm90::dense_decode::fp8 {

// 512 e4m3 codes; 4 f32 scales, one per 128 columns; 64 bf16 columns of rope. Values are bf16: each
// group of columns has a range of its own.
struct V32 {
  static constexpr int kRowBytes = 656;
  static constexpr int kPitch = 656;  // of rows in shared memory: without bank conflicts
  static constexpr bool kScales = true;
  static constexpr int kScaleGroups = 4, kScaleOffset = 512, kRopeOffset = 528;
  using Value = __nv_bfloat16;
};

// 576 e4m3 codes; one scale for the whole cache, so that codes alone are multiplied.
struct Fp8Row {
  static constexpr int kRowBytes = 576;
  static constexpr int kPitch = 592;  // TMA fills what is past a row with zeros
  static constexpr bool kScales = false;
  static constexpr int kScaleGroups = 0, kScaleOffset = 0, kRopeOffset = 512;
  using Value = __half;
};

}  // namespace flashmla::sm90::dense_decode::fp8
