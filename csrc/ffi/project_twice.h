// project_twice: its attributes, operands and results, and their way into ProjectTwiceParams.
#pragma once

#include <string>
#include <utility>

#include "ffi/buffers.h"
#include "ffi/rope_layout.h"
#include "params/project_twice.h"
#include "status.h"

namespace flashmla::ffi {

struct ProjectTwiceAttrs {
  bool transposed;
  int32_t layout;
};

template <typename Binding>
auto bind_project_twice(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // x
      .template Arg<AnyBuffer>()  // w
      .template Arg<AnyBuffer>()  // beside: another weight of x, of n = 0 where there is none
      .template Arg<AnyBuffer>()  // v
      .template Arg<F32R2>()      // cos
      .template Arg<F32R2>()      // sin
      .template Ret<AnyBuffer>()  // y
      .template Ret<AnyBuffer>()  // beside_y
      .template Ret<AnyBuffer>()  // workspace: what the first product makes
      .template Attrs<ProjectTwiceAttrs>();
}

inline Status read_project_twice(AnyBuffer x, AnyBuffer w, AnyBuffer beside, AnyBuffer v, F32R2 cos,
                                 F32R2 sin, Result<AnyBuffer> y, Result<AnyBuffer> beside_y,
                                 Result<AnyBuffer> between, const ProjectTwiceAttrs& attrs,
                                 ProjectTwiceParams* params) {
  ExtentChecks checks;
  const DType dtype = read_dtype(checks, "x", x.element_type());
  expect_same_dtype(checks, "w", w.element_type(), "x", x.element_type());
  expect_same_dtype(checks, "beside", beside.element_type(), "x", x.element_type());
  expect_same_dtype(checks, "beside_y", beside_y->element_type(), "x", x.element_type());
  expect_same_dtype(checks, "v", v.element_type(), "x", x.element_type());
  expect_same_dtype(checks, "y", y->element_type(), "x", x.element_type());
  expect_same_dtype(checks, "between", between->element_type(), "x", x.element_type());
  const auto [rows, groups, k] = checks.read<3>("x", x.dimensions(), {"rows", "groups", "k"});
  const auto first = checks.read<3>("w", w.dimensions(), {"groups", "k", "n"});
  const auto [heads, k2, n2] = checks.read<3>("v", v.dimensions(), {"heads", "k", "n"});
  const RopeLayout layout = read_layout(checks, attrs.layout);
  if (!checks.ok()) return checks.status();

  const Dimensions other = beside.dimensions();
  const int64_t n = first[attrs.transposed ? 1 : 2];
  const int64_t m = other.size() == 3 ? other[attrs.transposed ? 1 : 2] : 0;  // may be 0
  const auto expect_weight = [&](const char* name, const AnyBuffer& weight, Extent width) {
    const Extent depth = {"k", k};
    checks.expect(
        name, weight.dimensions(),
        {{"groups", groups}, attrs.transposed ? width : depth, attrs.transposed ? depth : width});
  };
  expect_weight("w", w, {"n", n});
  expect_weight("beside", beside, {"m", m});
  const bool turned = layout != RopeLayout::kNone;
  const int64_t columns = groups * n, rope = columns / heads - k2;
  if (rope < 0 || columns % heads != 0 || (turned && rope % 2 != 0)) {
    checks.fail("v must share out w's groups * n = " + std::to_string(columns) +
                " columns, each head's k of them and an even number, got " +
                ExtentChecks::to_string(v.dimensions()));
    return checks.status();
  }
  const int64_t pairs = turned ? rope / 2 : 0;
  checks.expect("cos", cos.dimensions(), {{"rows", rows}, {"rope / 2", pairs}});
  checks.expect("sin", sin.dimensions(), {{"rows", rows}, {"rope / 2", pairs}});
  checks.expect("y", y->dimensions(), {{"rows", rows}, {"heads", heads}, {"n + rope", n2 + rope}});
  checks.expect("beside_y", beside_y->dimensions(), {{"rows", rows}, {"groups", groups}, {"m", m}});
  checks.expect("between", between->dimensions(), {{"rows", rows}, {"groups * n", columns}});
  checks.int32("groups * n", columns);

  ProjectParams& to = params->first;
  ProjectParams& from = params->second;
  to = {}, from = {};
  to.dtype = from.dtype = dtype;
  to.rows = from.rows = checks.int32("rows", rows);
  to.groups = checks.int32("groups", groups);
  to.k = checks.int32("k", k);
  to.n = to.n_of[0] = checks.int32("n", n);
  to.transposed = attrs.transposed;
  to.layout = RopeLayout::kNone;
  to.x = x.untyped_data();
  to.n_of[1] = checks.int32("m", m);
  to.w[0] = w.untyped_data();
  to.w[1] = beside.untyped_data();
  to.y = between->untyped_data();
  to.out[0] = {to.y, n};
  to.out[1] = {beside_y->untyped_data(), m};
  from.groups = checks.int32("heads", heads);
  from.k = checks.int32("v's k", k2);
  from.n = from.n_of[0] = checks.int32("v's n", n2);
  from.rope = checks.int32("rope", rope);
  from.layout = layout;
  from.x = to.y;
  from.w[0] = v.untyped_data();
  from.cos = cos.typed_data();
  from.sin = sin.typed_data();
  from.y = y->untyped_data();
  from.out[0] = {from.y, n2 + rope};
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::ProjectTwiceAttrs,
                                      ::xla::ffi::StructMember<bool>("transposed"),
                                      ::xla::ffi::StructMember<int32_t>("layout"));

FLASHMLA_OPERATION(project_twice, ProjectTwiceParams)
