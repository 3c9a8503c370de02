// exchange: its attributes, operands and results, and their way into ExchangeParams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "ffi/buffers.h"
#include "params/exchange.h"
#include "status.h"

namespace flashmla::ffi {

struct ExchangeAttrs {
  int64_t group;
  bool gather;
};

template <typename Binding>
auto bind_exchange(Binding context) {
  return std::move(context)
      .template Ctx<xla::ffi::DeviceOrdinal>()
      .RemainingArgs()  // x, one or two
      .RemainingRets()  // out, as many
      .template Attrs<ExchangeAttrs>();
}

// Its shape [size, ...]; x has the same, without size where it is gathered.
inline void read_exchanged(ExtentChecks& checks, AnyBuffer x, AnyBuffer out, bool gather,
                           ExchangeParams* params) {
  const Dimensions shape = x.dimensions(), got = out.dimensions();
  const size_t leading = gather ? 1 : 0;
  if (got.size() < 1 || got.size() != shape.size() + leading ||
      !std::equal(shape.begin(), shape.end(), got.begin() + leading)) {
    checks.fail("out must have a segment of each device, of x " + ExtentChecks::to_string(shape) +
                ", got " + ExtentChecks::to_string(got));
    return;
  }
  expect_same_dtype(checks, "out", out.element_type(), "x", x.element_type());
  read_dtype(checks, "x", x.element_type());
  const int64_t size = got[0], bytes = static_cast<int64_t>(out.size_bytes());
  if (size < 2 || size > kMaxPeers || (params->count > 0 && size != params->size)) {
    checks.fail("every out must have between 2 and 8 segments, got " + std::to_string(size));
    return;
  }
  params->size = static_cast<int>(size);
  if (bytes == 0 || bytes % (size * 16) != 0) {
    checks.fail("a segment must have a multiple of 16 bytes, got " + std::to_string(bytes / size));
  }
  params->arrays[params->count++] = {x.untyped_data(), out.untyped_data(), bytes / size};
}

inline Status read_exchange(int32_t device, xla::ffi::RemainingArgs args,
                            xla::ffi::RemainingRets results, const ExchangeAttrs& attrs,
                            ExchangeParams* params) {
  ExtentChecks checks;
  *params = {};
  params->gather = attrs.gather;
  params->group = attrs.group;
  params->device = device;
  if (args.size() < 1 || args.size() > kMaxExchanged || results.size() != args.size()) {
    return Status::InvalidArgument("exchange takes one or two arrays and gives as many, got " +
                                   std::to_string(args.size()) + " and " +
                                   std::to_string(results.size()));
  }
  for (size_t i = 0; i < args.size() && checks.ok(); ++i) {
    const auto x = args.get<AnyBuffer>(i);
    auto out = results.get<AnyBuffer>(i);
    if (!x.has_value() || !out.has_value()) return Status::InvalidArgument("exchange: no buffer");
    read_exchanged(checks, *x, **out, attrs.gather, params);
  }
  return checks.status();
}

}  // namespace flashmla::ffi

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(flashmla::ffi::ExchangeAttrs,
                                      ::xla::ffi::StructMember<int64_t>("group"),
                                      ::xla::ffi::StructMember<bool>("gather"));

FLASHMLA_OPERATION(exchange, ExchangeParams)
