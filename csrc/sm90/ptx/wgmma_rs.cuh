// wgmma with A in registers: D[64 x N] (+)= A[64 x 16] * B[N x 16], B K-major, N = 16, 32 or 64.
#pragma once

#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90 {

// The lower half of k_major_desc's descriptor, which steps as that does; the upper half is
// constant.
__device__ __forceinline__ uint32_t operand_at(const void* chunk) {
  return static_cast<uint32_t>(k_major_desc(smem_address(chunk)));
}
__device__ __forceinline__ uint64_t descriptor(uint32_t operand) {
  return (k_major_desc(0) & ~uint64_t{0xffffffff}) | operand;
}

// clang-format off
#define FLASHMLA_WGMMA_N16_RS(TYPE) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7" \
      "}, {%8, %9, %10, %11}, %12, p, 1, 1, 0;\n}\n" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate))

#define FLASHMLA_WGMMA_N32_RS(TYPE) \
  asm volatile( \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0;\n}\n" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate))
// clang-format on

template <typename T>
__device__ __forceinline__ void wgmma_rs(float (&d)[8], const uint32_t* a, uint64_t b_desc,
                                         int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    FLASHMLA_WGMMA_N16_RS("bf16");
  else
    FLASHMLA_WGMMA_N16_RS("f16");
}

template <typename T>
__device__ __forceinline__ void wgmma_rs(float (&d)[16], const uint32_t* a, uint64_t b_desc,
                                         int accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    FLASHMLA_WGMMA_N32_RS("bf16");
  else
    FLASHMLA_WGMMA_N32_RS("f16");
}

template <typename T>
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const uint32_t* a, uint64_t b_desc,
                                         int accumulate) {
  wgmma_n64_rs<T>(d, *reinterpret_cast<const uint32_t (*)[4]>(a), b_desc, accumulate);
}
#undef FLASHMLA_WGMMA_N16_RS
#undef FLASHMLA_WGMMA_N32_RS

}  // namespace flashmla::sm90
