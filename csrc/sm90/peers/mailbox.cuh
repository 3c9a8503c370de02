// Words that travel between devices and are their own signal: a slot of a mailbox holds kEmpty
// until a word has arrived. So a message takes one way over NVLink, and no fence.
//
// In the PTX memory model every word is one relaxed access at system scope, and no order between
// words is relied on. Who emptied a slot, and when it is filled again, is ordered by the ends of
// kernels: see all_reduce_sum/kernel.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashmla::sm90::peers {

constexpr uint32_t kEmpty = 0xffffffff;     // a NaN in f32; two of them in bf16 and f16
constexpr uint32_t kOtherNaN = 0x7fff7fff;  // as well, and sent in its place

__device__ __forceinline__ uint32_t sealed(uint32_t word) {
  return word == kEmpty ? kOtherNaN : word;
}

__device__ __forceinline__ bool is_complete(const uint4& v) {
  return v.x != kEmpty && v.y != kEmpty && v.z != kEmpty && v.w != kEmpty;
}

__device__ __forceinline__ uint4 load_slot(const uint4* slot) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(slot)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_slot(uint4* slot, const uint4& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(slot), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void send(uint4* slot, const uint4& v) {
  store_slot(slot, {sealed(v.x), sealed(v.y), sealed(v.z), sealed(v.w)});
}

__device__ __forceinline__ void empty(uint4* slot) {
  store_slot(slot, {kEmpty, kEmpty, kEmpty, kEmpty});
}

__device__ constexpr uint4 kNaNs = {kOtherNaN, kOtherNaN, kOtherNaN, kOtherNaN};

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

}  // namespace flashmla::sm90::peers
