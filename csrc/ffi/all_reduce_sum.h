// all_reduce_sum: its attributes, operand and result, and their way into AllReduceSumParams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "ffi/buffers.h"
#include "params/all_reduce_sum.h"
#include "status.h"

namespace flashmla::ffi {

struct AllReduceSumAttrs {
  int64_t group;
};

template <typename Binding>
auto bind_all_reduce_sum(Binding context) {
  return std::move(context)
      .template Ctx<xla::ffi::DeviceOrdinal>()
      .template Arg<AnyBuffer>()  // x
      .template Ret<AnyBuffer>()  // out
      .template Attrs<AllReduceSumAttrs>();
}

inline Status read_all_reduce_sum(int32_t device, AnyBuffer x, Result<AnyBuffer> out,
                                  const AllReduceSumAttrs& attrs, AllReduceSumParams* params) {
  ExtentChecks checks;
  const Dimensions shape = x.dimensions(), got = out->dimensions();
  if (!std::equal(shape.begin(), shape.end(), got.begin(), got.end())) {
    checks.fail("out must have x's shape " + ExtentChecks::to_string(shape) + ", got " +
                ExtentChecks::to_string(got));
  }
  expect_same_dtype(checks, "out", out->element_type(), "x", x.element_type());
  if (x.element_count() == 0) {
    checks.fail("x must have elements, got " + ExtentChecks::to_string(shape));
  }
  params->dtype = read_dtype(checks, "x", x.element_type());
  params->elements = static_cast<int64_t>(x.element_count());
  params->group = attrs.group;
  params->device = device;
  params->x = x.untyped_data();
  params->out = out->untyped_data();
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::AllReduceSumAttrs,
                                      ::xla::ffi::StructMember<int64_t>("group"));

FLASHMLA_OPERATION(all_reduce_sum, AllReduceSumParams)
