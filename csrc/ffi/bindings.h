// The order and types of every operation's operands, results and attributes, the same on each
// platform. Each function extends a binding that holds the platform's execution context.
#pragma once

#include <utility>

#include "ffi/attrs.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla::ffi {

using xla::ffi::AnyBuffer;  // rank and element type (bf16, f16 or f32) are checked by to_params
using I32R1 = xla::ffi::BufferR1<xla::ffi::S32>;
using I32R2 = xla::ffi::BufferR2<xla::ffi::S32>;
using F32R3 = xla::ffi::BufferR3<xla::ffi::F32>;
using F32R4 = xla::ffi::BufferR4<xla::ffi::F32>;
template <typename Buffer>
using Result = xla::ffi::Result<Buffer>;

template <typename Binding>
auto bind_make_schedule(Binding context) {
  return std::move(context)
      .template Arg<I32R1>()   // cache_seqlens
      .template Ret<I32R2>();  // cuts
}

template <typename Binding>
auto bind_dense_decode(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()  // q
      .template Arg<AnyBuffer>()  // blocks
      .template Arg<I32R2>()      // block_table
      .template Arg<I32R1>()      // cache_seqlens
      .template Arg<I32R2>()      // cuts
      .template Ret<AnyBuffer>()  // out
      .template Ret<F32R3>()      // lse
      .template Ret<F32R4>()      // out_accum
      .template Ret<F32R3>()      // lse_accum
      .template Attrs<DenseDecodeAttrs>();
}

template <typename Binding>
auto bind_cache_append(Binding context) {
  return std::move(context)
      .template Arg<AnyBuffer>()   // blocks
      .template Arg<AnyBuffer>()   // rows
      .template Arg<I32R2>()       // block_table
      .template Arg<I32R1>()       // positions
      .template Arg<I32R1>()       // num_new
      .template Ret<AnyBuffer>();  // blocks updated, as a rule aliased to operand 0
}

}  // namespace flashmla::ffi
