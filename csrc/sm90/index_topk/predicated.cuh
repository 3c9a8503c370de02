// Accesses to shared memory under a predicate. Of the like in C++ the compiler makes a branch each.
#pragma once

#include <cmath>
#include <cstdint>

namespace flashmla::sm90::index_topk {

__device__ __forceinline__ void store_if(bool yes, uint32_t address, int32_t x) {
  asm volatile(
      "{\n.reg .pred yes;\n"
      "setp.ne.u32 yes, %2, 0;\n"
      "@yes st.shared::cta.s32 [%0], %1;\n}\n" ::"r"(address),
      "r"(x), "r"(uint32_t{yes})
      : "memory");
}

__device__ __forceinline__ void store_if(bool yes, uint32_t address, float x) {
  store_if(yes, address, __float_as_int(x));
}

// Appends to an array of which *count is how many it has.
__device__ __forceinline__ void append_if(bool yes, uint32_t array, uint32_t count, float x) {
  asm volatile(
      "{\n.reg .pred yes;\n.reg .u32 i;\n"
      "setp.ne.u32 yes, %3, 0;\n"
      "@yes atom.shared::cta.add.u32 i, [%1], 1;\n"
      "@yes mad.lo.u32 i, i, 4, %0;\n"
      "@yes st.shared::cta.f32 [i], %2;\n}\n" ::"r"(array),
      "r"(count), "f"(x), "r"(uint32_t{yes})
      : "memory");
}

// Stores at `address`, which then is the next one, unless `yes` is 0.
__device__ __forceinline__ void push_if(uint32_t yes, uint32_t& address, int32_t x) {
  asm volatile(
      "{\n.reg .pred yes;\n"
      "setp.ne.u32 yes, %2, 0;\n"
      "@yes st.shared::cta.s32 [%0], %1;\n"
      "@yes add.u32 %0, %0, 4;\n}\n"
      : "+r"(address)
      : "r"(x), "r"(yes)
      : "memory");
}

// From global memory, where the load stands: before barriers that follow. NaN if not.
__device__ __forceinline__ void load_if(bool yes, const float* from, float (&x)[4]) {
  x[0] = x[1] = x[2] = x[3] = NAN;
  asm volatile(
      "{\n.reg .pred yes;\n"
      "setp.ne.u32 yes, %5, 0;\n"
      "@yes ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n}\n"
      : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
      : "l"(from), "r"(uint32_t{yes})
      : "memory");
}

// The same of an integer; 0 if not.
__device__ __forceinline__ void load_if(bool yes, const int32_t* from, int32_t& x) {
  x = 0;
  asm volatile(
      "{\n.reg .pred yes;\n"
      "setp.ne.u32 yes, %2, 0;\n"
      "@yes ld.global.s32 %0, [%1];\n}\n"
      : "+r"(x)
      : "l"(from), "r"(uint32_t{yes})
      : "memory");
}

}  // namespace flashmla::sm90::index_topk
