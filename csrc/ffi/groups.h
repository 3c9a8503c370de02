// The Python functions of a module that open and close the groups of all_reduce_sum and exchange,
// outside of XLA. `Groups` has the platform's functions as static members.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "params/peers.h"
#include "status.h"

namespace flashmla::ffi {

inline void raise_unless_ok(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

template <typename Groups>
void define_groups(nanobind::module_& module) {
  module.def("open_group", [](int64_t group, int device, int rank, int size, int64_t subgroup,
                              double timeout_seconds) {
    const auto timeout_ns = static_cast<int64_t>(timeout_seconds * 1e9);
    std::string handle;
    raise_unless_ok(Groups::open_group({group, device, rank, size, subgroup, timeout_ns}, &handle));
    return nanobind::bytes(handle.data(), handle.size());
  });
  module.def("reach_member", [](int64_t group, int device, int peer_rank, int peer_device,
                                const nanobind::bytes& handle) {
    raise_unless_ok(Groups::reach_member(group, device, peer_rank, peer_device,
                                         std::string(handle.c_str(), handle.size())));
  });
  module.def("has_failed", Groups::has_failed);
  module.def("close_group", Groups::close_group);
}

}  // namespace flashmla::ffi
