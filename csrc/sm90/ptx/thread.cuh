// A thread's own number.
#pragma once

namespace flashmla::sm90 {

// threadIdx.x, read where it stands: what is derived from it is not computed early and kept. Known
// to be small, so that quotients and remainders are shifts and masks.
__device__ __forceinline__ int reread_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0 && thread < 1024);
  return thread;
}

}  // namespace flashmla::sm90
