// project: its attributes, operands and results, and their way into ProjectParams.
#pragma once

#include <string>
#include <utility>

#include "ffi/buffers.h"
#include "ffi/rope_layout.h"
#include "params/project.h"
#include "status.h"

namespace flashmla::ffi {

struct ProjectAttrs {
  bool transposed;
  int32_t layout;
};

template <typename Binding>
auto bind_project(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // x
      .template Arg<AnyBuffer>()  // w, up to three side by side: others have n = 0
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<F32R3>()      // exact_w: a float32 weight, of n = 0 where there is none
      .template Arg<F32R2>()      // cos
      .template Arg<F32R2>()      // sin
      .template Ret<AnyBuffer>()  // y
      .template Ret<F32R3>()      // exact_y
      .template Attrs<ProjectAttrs>();
}

inline Status read_project(AnyBuffer x, AnyBuffer w, AnyBuffer w1, AnyBuffer w2, F32R3 exact_w,
                           F32R2 cos, F32R2 sin, Result<AnyBuffer> y, Result<F32R3> exact_y,
                           const ProjectAttrs& attrs, ProjectParams* params) {
  ExtentChecks checks;
  params->dtype = read_dtype(checks, "x", x.element_type());
  const auto [rows, groups, columns] =
      checks.read<3>("x", x.dimensions(), {"rows", "groups", "k + rope"});
  const auto weights = checks.read<3>("w", w.dimensions(), {"groups", "k", "n"});
  params->layout = read_layout(checks, attrs.layout);
  if (!checks.ok()) return checks.status();

  const int64_t k = weights[attrs.transposed ? 2 : 1];
  int64_t n = 0;
  const AnyBuffer all[kMaxWeights] = {w, w1, w2};
  for (int i = 0; i < kMaxWeights; ++i) {
    const Dimensions got = all[i].dimensions();
    const int64_t n_of = got.size() == 3 ? got[attrs.transposed ? 1 : 2] : -1;
    const Extent depth = {"k", k}, width = {"n", n_of};
    checks.expect(
        "w", got,
        {{"groups", groups}, attrs.transposed ? width : depth, attrs.transposed ? depth : width});
    expect_same_dtype(checks, "w", all[i].element_type(), "x", x.element_type());
    params->n_of[i] = checks.int32("n", n_of);
    params->w[i] = all[i].untyped_data();
    n += n_of;
  }
  if (!checks.ok()) return checks.status();
  const int64_t rope = columns - k;
  const bool turned = params->layout != RopeLayout::kNone;
  if (rope < 0 || (turned && rope % 2 != 0)) {
    checks.fail("w must have at most x's " + std::to_string(columns) +
                " columns as k, an even number of them left, got " +
                ExtentChecks::to_string(w.dimensions()));
    return checks.status();
  }
  const int64_t pairs = turned ? rope / 2 : 0;
  checks.expect("cos", cos.dimensions(), {{"rows", rows}, {"rope / 2", pairs}});
  checks.expect("sin", sin.dimensions(), {{"rows", rows}, {"rope / 2", pairs}});
  checks.expect("y", y->dimensions(), {{"rows", rows}, {"groups", groups}, {"n + rope", n + rope}});
  expect_same_dtype(checks, "y", y->element_type(), "x", x.element_type());
  const int64_t exact_n = exact_w.dimensions()[2];
  checks.expect("exact_w", exact_w.dimensions(),
                {{"groups", groups}, {"k", k}, {"exact_n", exact_n}});
  checks.expect("exact_y", exact_y->dimensions(),
                {{"rows", rows}, {"groups", groups}, {"exact_n", exact_n}});

  params->rows = checks.int32("rows", rows);
  params->groups = checks.int32("groups", groups);
  params->k = checks.int32("k", k);
  params->n = checks.int32("n", n);
  params->rope = checks.int32("rope", rope);
  params->exact_n = checks.int32("exact_n", exact_n);
  params->transposed = attrs.transposed;
  for (int64_t i = 0, to = 0; i < kMaxWeights; to += params->n_of[i++]) {
    params->out[i] = {static_cast<char*>(y->untyped_data()) + to * itemsize(params->dtype),
                      n + rope};
  }
  params->x = x.untyped_data();
  params->cos = cos.typed_data();
  params->sin = sin.typed_data();
  params->exact_w = exact_w.typed_data();
  params->y = y->untyped_data();
  params->exact_y = exact_y->typed_data();
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::ProjectAttrs,
                                      ::xla::ffi::StructMember<bool>("transposed"),
                                      ::xla::ffi::StructMember<int32_t>("layout"));

FLASHMLA_OPERATION(project, ProjectParams)
