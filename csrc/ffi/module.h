// What both extension modules share: an XLA FFI handler over an operation's run function, and the
// Python functions that hand the handlers over.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <utility>

#include "ffi/error.h"
#include "ffi/to_params.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla::ffi {

// Called by XLA with the platform's execution context, then everything that bindings.h lists.
template <typename Params, auto kRun>
constexpr auto checked_call = [](auto context, const auto&... buffers_and_attrs) {
  return run_to_error([&]() -> Status {
    Params params;
    if (Status status = to_params(buffers_and_attrs..., &params); !status.ok()) return status;
    return kRun(params, context);
  });
};

inline nanobind::capsule to_capsule(XLA_FFI_Handler* xla_handler) {
  return nanobind::capsule(reinterpret_cast<void*>(xla_handler));
}

// The Python functions of a module: its handlers by target, and the version of the FFI headers that
// it was built with (a jaxlib runs handlers of its own version and of older ones).
inline void define_functions(nanobind::module_& module, XLA_FFI_Handler* make_schedule,
                             XLA_FFI_Handler* dense_decode, XLA_FFI_Handler* cache_append) {
  module.def("registrations", [=] {
    nanobind::dict handlers;
    handlers["flashmla_make_schedule_v1"] = to_capsule(make_schedule);
    handlers["flashmla_dense_decode_v1"] = to_capsule(dense_decode);
    handlers["flashmla_cache_append_v1"] = to_capsule(cache_append);
    return handlers;
  });
  module.def("ffi_api_version", [] { return std::pair(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); });
}

}  // namespace flashmla::ffi
