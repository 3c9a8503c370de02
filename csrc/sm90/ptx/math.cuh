// Approximations of the special function unit, which flush denormals to zero.
#pragma once

namespace flashmla::sm90 {

constexpr float kLn2 = 0.6931471805599453f, kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flashmla::sm90
