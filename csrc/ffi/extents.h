// Checks that buffers agree with one another before anything dereferences them. The first failure
// is kept; later checks run harmlessly on extents of 0.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include "../status.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla::ffi {

using Dimensions = xla::ffi::Span<const int64_t>;

struct Extent {
  const char* name;
  int64_t size;
};

class ExtentChecks {
 public:
  // The extents of a buffer that other buffers are held against: each at least 1.
  template <size_t rank>
  std::array<int64_t, rank> read(const char* buffer, Dimensions got,
                                 const std::array<const char*, rank>& names) {
    bool valid = got.size() == rank;
    for (int64_t extent : got) valid = valid && extent >= 1;
    if (!valid) {
      std::string expected;
      for (const char* name : names) expected += (expected.empty() ? "" : ", ") + std::string(name);
      fail(std::string(buffer) + " must have shape [" + expected +
           "] with every extent at least 1, " + "got " + to_string(got));
      return {};
    }
    std::array<int64_t, rank> extents;
    for (size_t i = 0; i < rank; ++i) extents[i] = got[i];
    return extents;
  }

  // A buffer whose every extent is known.
  void expect(const char* buffer, Dimensions got, std::initializer_list<Extent> expected) {
    bool equal = got.size() == expected.size();
    size_t i = 0;
    std::string text;
    for (const Extent& extent : expected) {
      equal = equal && got[i++] == extent.size;
      text +=
          (text.empty() ? "" : ", ") + std::string(extent.name) + "=" + std::to_string(extent.size);
    }
    if (!equal) {
      fail(std::string(buffer) + " must have shape [" + text + "], got " + to_string(got));
    }
  }

  // An extent (or a product of extents) that kernels hold in 32 bits.
  int int32(const char* name, int64_t size) {
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    require(size <= kMax, std::string(name) + " must be at most " + std::to_string(kMax) +
                              ", got " + std::to_string(size));
    return static_cast<int>(size);
  }

  void require(bool holds, const std::string& message) {
    if (!holds) fail(message);
  }

  bool ok() const { return status_.ok(); }
  const Status& status() const { return status_; }

 private:
  static std::string to_string(Dimensions extents) {
    std::string text;
    for (int64_t extent : extents) text += (text.empty() ? "" : ", ") + std::to_string(extent);
    return "[" + text + "]";
  }

  void fail(std::string message) {
    if (status_.ok()) status_ = Status::InvalidArgument(std::move(message));
  }

  Status status_;
};

}  // namespace flashmla::ffi
