// A thread's copies from global to shared memory (cp.async), which may complete on an mbarrier.
// They write as ordinary stores do: before wgmma or TMA read, a proxy fence.
#pragma once

#include <cstdint>

namespace flashmla::sm90 {

__device__ __forceinline__ void copy_4(uint32_t target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void copy_8(uint32_t target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(target), "l"(source) : "memory");
}

// Past L1.
__device__ __forceinline__ void copy_16(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// Zeros instead, and nothing is read, if not `valid`. Past L1.
__device__ __forceinline__ void copy_16_or_zero(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Ends a group of this thread's copies, and waits until at most `kPending` groups are unfinished.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// This thread's arrival, one of those that the mbarrier counts, once all copies that the thread has
// begun are complete.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

}  // namespace flashmla::sm90
