// Checks that buffers agree with one another before anything dereferences them. The first failure
// is kept; later checks run harmlessly on extents of 0.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla::ffi {

using Dimensions = xla::ffi::Span<const int64_t>;

struct Extent {
  const char* name;
  int64_t size;
};

// Messages are put together only where a check fails: handlers run once per layer and step.
class ExtentChecks {
 public:
  // The extents of a buffer that other buffers are held against: each at least 1.
  template <size_t rank>
  std::array<int64_t, rank> read(const char* buffer, Dimensions got,
                                 const std::array<const char*, rank>& names) {
    if (got.size() != rank ||
        std::any_of(got.begin(), got.end(), [](int64_t n) { return n < 1; })) {
      std::string expected;
      for (const char* name : names) append(expected, name);
      fail(std::string(buffer) + " must have shape [" + expected +
           "] with every extent at least 1, " + "got " + to_string(got));
      return {};
    }
    std::array<int64_t, rank> extents;
    std::copy(got.begin(), got.end(), extents.begin());
    return extents;
  }

  // A buffer whose every extent is known.
  void expect(const char* buffer, Dimensions got, std::initializer_list<Extent> expected) {
    const auto equals = [](int64_t size, const Extent& extent) { return size == extent.size; };
    if (std::equal(got.begin(), got.end(), expected.begin(), expected.end(), equals)) return;
    std::string text;
    for (const Extent& extent : expected) {
      append(text, std::string(extent.name) + "=" + std::to_string(extent.size));
    }
    fail(std::string(buffer) + " must have shape [" + text + "], got " + to_string(got));
  }

  // An extent (or a product of extents) that kernels hold in 32 bits.
  int int32(const char* name, int64_t size) {
    if (size > std::numeric_limits<int32_t>::max()) {
      fail(std::string(name) + " must be less than 2^31, got " + std::to_string(size));
    }
    return static_cast<int>(size);
  }

  void fail(std::string message) {
    if (status_.ok()) status_ = Status::InvalidArgument(std::move(message));
  }

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }

  static std::string to_string(Dimensions extents) {
    std::string text;
    for (int64_t extent : extents) append(text, std::to_string(extent));
    return "[" + text + "]";
  }

 private:
  static void append(std::string& list, const std::string& item) {
    list += (list.empty() ? "" : ", ") + item;
  }

  Status status_;
};

}  // namespace flashmla::ffi
