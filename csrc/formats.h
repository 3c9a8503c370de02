// Cache formats: how the bytes of a token lie in a block. Shared by ffi/, cpu/ and sm90/ (host and
// device).
//
// A block is a sequence of planes. A plane holds so many bytes of every token, token after token;
// then the next plane follows. Dense blocks have one plane of 16- or 32-bit rows, whose width is
// the caller's; the other formats know their own.
#pragma once

#include <cstdint>

namespace flashmla {

// The values are the FFI attribute `format` (jax_flashmla/_limits.py).
enum class Format : int32_t {
  kDense = 0,
  kV32 = 1,      // 512 e4m3, 4 f32 scales, 64 16-bit rope columns
  kV32Nope = 2,  // 512 e4m3, 4 f32 scales
  kV4 = 3,       // 448 e4m3, 64 16-bit rope columns; 7 ue8m0 scales, 1 byte of padding
  kV41 = 4,      // 512 e4m3, 16 ue8m0 scales
  kV41Fp4 = 5,   // 512 e2m1, 32 e4m3 scales
  kFp8Row = 6,   // 576 e4m3; one scale for the whole cache, which is data
  kFp8Index = 7  // 128 e4m3; 1 f32 scale
};
constexpr int kNumFormats = 8;
constexpr int kMaxPlanes = 2;

struct FormatLayout {
  int d_qk, d_v;  // columns of a row, and of its value
  int planes;
  int plane_bytes[kMaxPlanes];  // of a token
  int block_multiple;           // bytes that a block's size is padded to a multiple of
};

// All zeros for kDense.
constexpr FormatLayout layout_of(Format format) {
  switch (format) {
    case Format::kV32:
      return {576, 512, 1, {656, 0}, 1};
    case Format::kV32Nope:
      return {512, 512, 1, {528, 0}, 1};
    case Format::kV4:
      return {512, 512, 2, {576, 8}, 576};
    case Format::kV41:
      return {512, 512, 1, {528, 0}, 1};
    case Format::kV41Fp4:
      return {512, 512, 1, {288, 0}, 1};
    case Format::kFp8Row:
      return {576, 512, 1, {576, 0}, 1};
    case Format::kFp8Index:
      return {128, 128, 2, {128, 4}, 1};
    case Format::kDense:
      break;
  }
  return {};
}

constexpr int64_t bytes_per_token(Format format) {
  const FormatLayout layout = layout_of(format);
  return layout.plane_bytes[0] + layout.plane_bytes[1];
}

constexpr int64_t bytes_per_block(Format format, int64_t block_size) {
  const int64_t multiple = layout_of(format).block_multiple;
  return (block_size * bytes_per_token(format) + multiple - 1) / multiple * multiple;
}

}  // namespace flashmla
