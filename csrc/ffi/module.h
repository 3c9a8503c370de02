// What both extension modules share: the checked call of an operation's run function, the list of
// handlers, and the Python functions that hand them over.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <utility>
#include <vector>

#include "ffi/error.h"
#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla::ffi {

// Called by XLA with the platform's execution context, then everything that bind_<op> lists.
// kRead (read_<op>) makes params of the latter.
template <typename Params, auto kRead, auto kRun>
constexpr auto checked_call = [](auto context, const auto&... buffers_and_attrs) {
  return run_to_error([&]() -> Status {
    Params params;
    if (Status status = kRead(buffers_and_attrs..., &params); !status.ok()) return status;
    return kRun(params, context);
  });
};

struct Registration {
  const char* target;
  XLA_FFI_Handler* handler;
};

// Filled by FLASHMLA_OPERATION before the module is initialised.
inline std::vector<Registration>& registrations() {
  static std::vector<Registration> list;
  return list;
}

inline bool add_registration(const char* target, XLA_FFI_Handler* handler) {
  registrations().push_back({target, handler});
  return true;
}

// The Python functions of a module: its handlers by target, and the version of the FFI headers that
// it was built with (a jaxlib runs handlers of its own version and of older ones).
inline void define_functions(nanobind::module_& module) {
  module.def("registrations", [] {
    nanobind::dict handlers;
    for (const Registration& entry : registrations()) {
      handlers[entry.target] = nanobind::capsule(reinterpret_cast<void*>(entry.handler));
    }
    return handlers;
  });
  module.def("ffi_api_version", [] { return std::pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
}

}  // namespace flashmla::ffi
