// A thread's own number.
#pragma once

namespace flashmla::sm90 {

// threadIdx.x of at most 512, read where it stands: what is derived from it is not computed early
// and kept. Known to be small, so that quotients and remainders are shifts and masks.
__device__ __forceinline__ int reread_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread & 511;
}

}  // namespace flashmla::sm90
