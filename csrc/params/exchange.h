// What exchange is given.
#pragma once

#include <cstdint>

namespace flashmla {

constexpr int kMaxExchanged = 2;  // arrays of one call

// An array's segment of each device: to it in x, from it in out.
struct Exchanged {
  const void* x;  // [size, bytes]; [bytes] where it is gathered
  void* out;      // [size, bytes]
  int64_t bytes;  // of a segment, a multiple of 16
};

// Each device of a group sends every other its segments, or all that it has. Each of them makes the
// same calls in the same order. Words of 32 bits that are all ones may arrive as another NaN.
struct ExchangeParams {
  Exchanged arrays[kMaxExchanged];
  int count;      // arrays that there are
  int size;       // segments of out: devices of the group
  bool gather;    // x is the same to everyone
  int64_t group;  // which group, as it was opened
  int device;     // which of the process's devices this call is on
};

}  // namespace flashmla
