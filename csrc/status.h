// The result of running an operation, free of XLA and of CUDA: ffi/error.h turns it into an FFI
// error.
#pragma once

#include <string>
#include <utility>

namespace flashmla {

enum class StatusCode { kOk, kInvalidArgument, kFailedPrecondition, kInternal };

struct Status {
  StatusCode code = StatusCode::kOk;
  std::string message;

  static Status Ok() { return {}; }
  static Status InvalidArgument(std::string m) {
    return {StatusCode::kInvalidArgument, std::move(m)};
  }
  static Status FailedPrecondition(std::string m) {
    return {StatusCode::kFailedPrecondition, std::move(m)};
  }
  static Status Internal(std::string m) { return {StatusCode::kInternal, std::move(m)}; }

  bool ok() const { return code == StatusCode::kOk; }
};

}  // namespace flashmla
