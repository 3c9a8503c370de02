// What the kernel must know of a row format, and in which type its values are multiplied.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sm90/dense_decode/fp8/config.h"

namespace flashmla::sm90::dense_decode::fp8 {

// Rows lie in shared memory as they do in the cache, copied up to kCopyTokens at once. Products
// take a tile's tokens in an order, their places, in which any eight of them, the first's place a
// multiple of eight, are read without bank conflicts.

// 512 e4m3 codes; 4 f32 scales, one per 128 columns; 64 bf16 columns of rope. Values are bf16: each
// group of columns has a range of its own.
struct V32 {
  static constexpr int kRowBytes = 656;  // an odd number of 16 bytes: tokens in their order
  static constexpr int kCopyTokens = kTileTokens;
  static constexpr int kCopyStride = kCopyTokens * kRowBytes;
  static constexpr int kTileBytes = kCopyStride;
  static constexpr bool kScales = true;
  static constexpr int kScaleGroups = 4, kScaleOffset = 512, kRopeOffset = 528;
  using Value = __nv_bfloat16;

  __device__ static constexpr int token_at(int place) { return place; }
  // Of a token's row in its tile.
  __device__ static constexpr int offset(int token) { return token * kRowBytes; }
  __device__ static constexpr int offset_at(int place) { return place * kRowBytes; }
};

// 576 e4m3 codes; one scale for the whole cache, so that codes alone are multiplied.
struct Fp8Row {
  static constexpr int kRowBytes = 576;  // two neighbours are 64 bytes apart, modulo 128
  static constexpr int kCopyTokens = 16;
  static constexpr int kCopyStride =
      kCopyTokens * kRowBytes + 16;  // four copies are 16 bytes apart
  static constexpr int kTileBytes = kTileTokens / kCopyTokens * kCopyStride;
  static constexpr bool kScales = false;
  static constexpr int kScaleGroups = 0, kScaleOffset = 0, kRopeOffset = 512;
  using Value = __half;

  // Of any eight places two neighbours of each copy.
  __device__ static constexpr int token_at(int place) {
    return place % 8 / 2 * kCopyTokens + place / 8 * 2 + place % 2;
  }
  __device__ static constexpr int offset(int token) {
    return token / kCopyTokens * kCopyStride + token % kCopyTokens * kRowBytes;
  }
  __device__ static constexpr int offset_at(int place) {
    return place % 8 / 2 * kCopyStride + (place / 8 * 2 + place % 2) * kRowBytes;
  }
};

}  // namespace flashmla::sm90::dense_decode::fp8
