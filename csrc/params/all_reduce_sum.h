// What all_reduce_sum is given.
#pragma once

#include <cstdint>

#include "params/dtype.h"

namespace flashmla {

// Sums x over the devices of a group. Each of them makes the same calls in the same order.
struct AllReduceSumParams {
  int64_t elements;
  DType dtype;
  int64_t group;  // which group, as it was opened
  int device;     // which of the process's devices this call is on
  const void* x;  // [elements]
  void* out;      // [elements], the same bits on all devices
};

}  // namespace flashmla
