// Attributes that name a layout of rotated columns.
#pragma once

#include <cstdint>
#include <string>

#include "ffi/extents.h"
#include "params/rope.h"

namespace flashmla::ffi {

inline RopeLayout read_layout(ExtentChecks& checks, int32_t layout) {
  if (layout < 0 || layout >= kNumRopeLayouts) {
    checks.fail("layout must be between 0 and " + std::to_string(kNumRopeLayouts - 1) + ", got " +
                std::to_string(layout));
  }
  return static_cast<RopeLayout>(layout);
}

}  // namespace flashmla::ffi
