// From an operation's Status to XLA's error. No exception leaves a handler.
#pragma once

#include <exception>

#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla::ffi {

inline xla::ffi::Error to_error(const Status& status) {
  using xla::ffi::ErrorCode;
  switch (status.code) {
    case StatusCode::kOk:
      return xla::ffi::Error::Success();
    case StatusCode::kInvalidArgument:
      return xla::ffi::Error(ErrorCode::kInvalidArgument, status.message);
    case StatusCode::kFailedPrecondition:
      return xla::ffi::Error(ErrorCode::kFailedPrecondition, status.message);
    case StatusCode::kInternal:
      break;
  }
  return xla::ffi::Error(ErrorCode::kInternal, status.message);
}

// Runs a function that returns a Status.
template <typename Function>
xla::ffi::Error run_to_error(Function&& function) {
  try {
    return to_error(function());
  } catch (const std::exception& exception) {
    return xla::ffi::Error(xla::ffi::ErrorCode::kInternal, exception.what());
  }
}

}  // namespace flashmla::ffi
