// The types of operands and results, and what several operations read off them.
#pragma once

#include <cstdint>
#include <string>

#include "ffi/extents.h"
#include "formats.h"
#include "params/dtype.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla::ffi {

using xla::ffi::AnyBuffer;  // rank and element type are checked where it is read
using F32R0 = xla::ffi::BufferR0<xla::ffi::F32>;
using F32R3 = xla::ffi::BufferR3<xla::ffi::F32>;
using F32R4 = xla::ffi::BufferR4<xla::ffi::F32>;
using F32R1 = xla::ffi::BufferR1<xla::ffi::F32>;
using F32R2 = xla::ffi::BufferR2<xla::ffi::F32>;
using I32R0 = xla::ffi::BufferR0<xla::ffi::S32>;
using I32R1 = xla::ffi::BufferR1<xla::ffi::S32>;
using I32R2 = xla::ffi::BufferR2<xla::ffi::S32>;
using I32R3 = xla::ffi::BufferR3<xla::ffi::S32>;
using U8R1 = xla::ffi::BufferR1<xla::ffi::U8>;
template <typename Buffer>
using Result = xla::ffi::Result<Buffer>;

// The element type of a buffer that must hold bf16, f16 or f32.
inline DType read_dtype(ExtentChecks& checks, const char* buffer, xla::ffi::DataType got) {
  if (got == xla::ffi::BF16) return DType::kBFloat16;
  if (got == xla::ffi::F16) return DType::kFloat16;
  if (got != xla::ffi::F32) {
    checks.fail(std::string(buffer) + " must be bf16, f16 or f32, got XLA element type " +
                std::to_string(static_cast<int>(got)));
  }
  return DType::kFloat32;
}

inline void expect_same_dtype(ExtentChecks& checks, const char* buffer, xla::ffi::DataType got,
                              const char* other, xla::ffi::DataType expected) {
  if (got != expected) {
    checks.fail(std::string(buffer) + " must have the element type of " + other);
  }
}

// num_parts, from cuts [num_parts + 1, 2].
inline int64_t read_num_parts(ExtentChecks& checks, Dimensions cuts) {
  if (cuts[0] < 2 || cuts[1] != 2) {
    checks.fail("cuts must have shape [num_parts + 1, 2] with num_parts at least 1, got " +
                ExtentChecks::to_string(cuts));
  }
  return cuts[0] - 1;
}

inline void check_table_reach(ExtentChecks& checks, int64_t max_blocks, int64_t block_size) {
  if (checks.ok()) checks.int32("max_blocks * block_size (tokens)", max_blocks * block_size);
}

// A cache's blocks. Dense: [num_blocks, block_size, h_kv, row_stride] of 16- or 32-bit floats. One
// plane: [num_blocks, block_size, 1, bytes], several: [num_blocks, block_bytes], both uint8.
struct BlocksExtents {
  Format format = Format::kDense;
  int64_t num_blocks = 0, block_size = 0, h_kv = 0, row_stride = 0, block_bytes = 0;
};

inline BlocksExtents read_fp8_blocks(ExtentChecks& checks, Dimensions got, Format format,
                                     int64_t block_size, const char* name) {
  const FormatLayout layout = layout_of(format);
  const int64_t block_bytes = bytes_per_block(format, block_size);
  int64_t num_blocks = 0;
  if (layout.planes == 1) {
    num_blocks = checks.read<4>(name, got, {"num_blocks", "block_size", "1", "bytes"})[0];
    checks.expect(name, got,
                  {{"num_blocks", num_blocks},
                   {"block_size", block_size},
                   {"h_kv", 1},
                   {"bytes", layout.plane_bytes[0]}});
  } else {
    num_blocks = checks.read<2>(name, got, {"num_blocks", "block_bytes"})[0];
    checks.expect(name, got, {{"num_blocks", num_blocks}, {"block_bytes", block_bytes}});
  }
  return {format, num_blocks, block_size, 1, layout.d_qk, block_bytes};
}

// Dense blocks [num_blocks, block_size, h_kv, row_stride]. If h_kv is given, the leading extents
// may divide blocks in any way: an engine's pages are [pages, page_size / pack, pack, row_stride].
inline BlocksExtents read_dense_blocks(ExtentChecks& checks, const AnyBuffer& blocks,
                                       int64_t block_size, const char* name, int64_t h_kv) {
  const Dimensions got = blocks.dimensions();
  const auto [outer, middle, inner, row_stride] =
      checks.read<4>(name, got, {"num_blocks", "block_size", "h_kv", "row_stride"});
  if (h_kv == 0) {
    h_kv = inner;
    checks.expect(name, got,
                  {{"num_blocks", outer},
                   {"block_size", block_size},
                   {"h_kv", h_kv},
                   {"row_stride", row_stride}});
  }
  const int64_t rows = outer * middle * inner, block_rows = block_size * h_kv;
  if (block_rows < 1 || rows % block_rows != 0) {
    checks.fail(std::string(name) + " must hold whole blocks of block_size=" +
                std::to_string(block_size) + " tokens with h_kv=" + std::to_string(h_kv) +
                " rows each, got " + ExtentChecks::to_string(got));
    return {};
  }
  read_dtype(checks, name, blocks.element_type());
  const auto itemsize = static_cast<int64_t>(xla::ffi::ByteWidth(blocks.element_type()));
  return {Format::kDense, rows / block_rows, block_size,
          h_kv,           row_stride,        block_rows * row_stride * itemsize};
}

inline BlocksExtents read_blocks(ExtentChecks& checks, const AnyBuffer& blocks, int32_t format,
                                 int32_t block_size, const char* name = "blocks",
                                 int64_t h_kv = 0) {
  if (format < 0 || format >= kNumFormats || block_size < 1) {
    checks.fail("format must be between 0 and " + std::to_string(kNumFormats - 1) +
                " and block_size at least 1, got " + std::to_string(format) + " and " +
                std::to_string(block_size));
    return {};
  }
  if (format == static_cast<int32_t>(Format::kDense)) {
    return read_dense_blocks(checks, blocks, block_size, name, h_kv);
  }
  if (blocks.element_type() != xla::ffi::U8) {
    checks.fail(std::string(name) + " must be uint8, the bytes of their format");
  }
  return read_fp8_blocks(checks, blocks.dimensions(), static_cast<Format>(format), block_size,
                         name);
}

}  // namespace flashmla::ffi
