// How a cache's blocks are stored. A block is a sequence of planes: a plane holds so many bytes of
// every token, token after token; then comes the next plane. jax_flashmla/cache/format.py says the
// same in Python. Shared by cpu/ and sm90/.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace flashmla {

// The values are the FFI attribute `format` (jax_flashmla/_limits.py).
enum class Format : int32_t { kDense, kV32, kV32Nope, kV4, kV41, kV41Fp4, kFp8Row, kFp8Index };
constexpr int kNumFormats = 8;

enum class ScaleType : int32_t {
  kCache,    // one f32 for the whole cache, given apart
  kFloat32,  // f32 that are powers of two
  kE8M0,     // exponent + 127
  kE4M3,     // with codes that are e2m1, two a byte, the even column in the low nibble
};

// What a token's bytes are: codes of the leading columns (e4m3 unless said otherwise), one scale
// for each group of columns, then the remaining columns (the rotary key) as bf16.
struct FormatLayout {
  int d_qk, d_v;
  int codes;        // columns stored as codes
  int group;        // columns that share a scale, a power of two; divides codes
  ScaleType scale;  // value = code * scale
  int planes;
  int plane_bytes[2];  // of a token; 0 where there is no second plane
  int scale_plane, scale_offset;
  int rope_offset;     // in plane 0
  int block_multiple;  // bytes that a block is padded to a multiple of
};

// Zeros for kDense, whose rows are d_qk elements every row_stride.
FLASHMLA_HOST_DEVICE constexpr FormatLayout layout_of(Format format) {
  switch (format) {
    case Format::kV32:
      return {576, 512, 512, 128, ScaleType::kFloat32, 1, {656, 0}, 0, 512, 528, 1};
    case Format::kV32Nope:
      return {512, 512, 512, 128, ScaleType::kFloat32, 1, {528, 0}, 0, 512, 528, 1};
    case Format::kV4:  // the last of a token's 8 scale bytes is padding
      return {512, 512, 448, 64, ScaleType::kE8M0, 2, {576, 8}, 1, 0, 448, 576};
    case Format::kV41:
      return {512, 512, 512, 32, ScaleType::kE8M0, 1, {528, 0}, 0, 512, 528, 1};
    case Format::kV41Fp4:
      return {512, 512, 512, 16, ScaleType::kE4M3, 1, {288, 0}, 0, 256, 288, 1};
    case Format::kFp8Row:
      return {576, 512, 576, 64, ScaleType::kCache, 1, {576, 0}, 0, 576, 576, 1};
    case Format::kFp8Index:
      return {128, 128, 128, 128, ScaleType::kFloat32, 2, {128, 4}, 1, 0, 128, 1};
    case Format::kDense:
      break;
  }
  return {};
}

// Bytes from a block's beginning to its plane's.
FLASHMLA_HOST_DEVICE constexpr int64_t plane_offset(const FormatLayout& layout, int plane,
                                                    int block_size) {
  return plane == 0 ? 0 : int64_t{layout.plane_bytes[0]} * block_size;
}

// Bytes from a block's beginning to a token's in a plane.
FLASHMLA_HOST_DEVICE constexpr int64_t row_offset(const FormatLayout& layout, int plane,
                                                  int block_size, int token) {
  return plane_offset(layout, plane, block_size) +
         int64_t{plane == 0 ? layout.plane_bytes[0] : layout.plane_bytes[1]} * token;
}

FLASHMLA_HOST_DEVICE constexpr int64_t bytes_per_token(Format format) {
  const FormatLayout layout = layout_of(format);
  return layout.plane_bytes[0] + layout.plane_bytes[1];
}

// Bytes from block to block, padding included.
FLASHMLA_HOST_DEVICE constexpr int64_t bytes_per_block(Format format, int64_t block_size) {
  const int64_t multiple = layout_of(format).block_multiple;
  return (block_size * bytes_per_token(format) + multiple - 1) / multiple * multiple;
}

static_assert(bytes_per_block(Format::kV32, 64) == 64 * 656);
static_assert(bytes_per_block(Format::kV4, 64) == 65 * 576);  // 64 * 584 = 64.9 * 576
static_assert(bytes_per_block(Format::kFp8Index, 64) == 64 * 132);

}  // namespace flashmla
