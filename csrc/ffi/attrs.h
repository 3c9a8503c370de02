// The attributes that an operation takes besides its buffers. XLA refuses a call whose attributes
// are missing, misspelt, superfluous or of another type.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace flashmla::ffi {

struct DenseDecodeAttrs {
  float sm_scale;
  bool causal;
};

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::DenseDecodeAttrs,
                                      ::xla::ffi::StructMember<float>("sm_scale"),
                                      ::xla::ffi::StructMember<bool>("causal"));
