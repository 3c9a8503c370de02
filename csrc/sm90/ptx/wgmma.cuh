// Warpgroup matrix multiply-accumulate: D (f32 registers) += A * B, B always in shared memory.
// m64nNk16: A is 64 x 16, B is N x 16. Operands in shared memory are named by descriptors
// (smem_desc.cuh). B "K-major": element (n, k) of a row n is contiguous in k. B "MN-major":
// contiguous in n (transposed).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "sm90/ptx/wgmma_operands.h"

namespace flashmla::sm90 {

// Orders register and shared-memory accesses of this warpgroup before its next wgmma.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` committed groups of this warpgroup are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads or writes of an accumulator across this point.
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Products of N columns: a thread has N / 2 registers of D, which accumulate = 0 overwrites.
// Strings name the operands behind those registers.
// clang-format off
#define FLASHMLA_WGMMA(N, REGISTERS, A, B, ACCUMULATE, TYPE, FLAGS, ...)                       \
  asm volatile(                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n"                                  \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"                     \
      FLASHMLA_D##REGISTERS "}, " A ", " B ", p, 1, 1, " FLAGS ";\n}\n"                        \
      : FLASHMLA_OUT##REGISTERS : __VA_ARGS__)

// wgmma_rs: D[64 x N] (+)= A (registers a[0] to a[3]) * B (K-major).
#define FLASHMLA_WGMMA_RS(N, REGISTERS, A, B, ACCUMULATE)                                      \
  template <typename T>                                                                        \
  __device__ __forceinline__ void wgmma_rs(float (&d)[REGISTERS], const uint32_t* a,           \
                                           uint64_t b_desc, int accumulate) {                  \
    if constexpr (std::is_same_v<T, __nv_bfloat16>)                                            \
      FLASHMLA_WGMMA(N, REGISTERS, A, B, ACCUMULATE, "bf16", "0",                              \
          "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate));           \
    else                                                                                       \
      FLASHMLA_WGMMA(N, REGISTERS, A, B, ACCUMULATE, "f16", "0",                               \
          "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate));           \
  }
FLASHMLA_WGMMA_RS(16, 8, "{%8, %9, %10, %11}", "%12", "%13")
FLASHMLA_WGMMA_RS(32, 16, "{%16, %17, %18, %19}", "%20", "%21")
FLASHMLA_WGMMA_RS(64, 32, "{%32, %33, %34, %35}", "%36", "%37")
FLASHMLA_WGMMA_RS(128, 64, "{%64, %65, %66, %67}", "%68", "%69")

// NAME: D[64 x N] (+)= A * B, both in shared memory. A is K-major or, if transposed, M-major; B is
// K-major with TRANSPOSED_B "0", MN-major with "1".
#define FLASHMLA_WGMMA_SS(NAME, N, REGISTERS, A, B, ACCUMULATE, TRANSPOSED_B)                  \
  template <typename T, bool kTransposedA = false>                                             \
  __device__ __forceinline__ void NAME(float (&d)[REGISTERS], uint64_t a_desc, uint64_t b_desc, \
                                       int accumulate) {                                       \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                          \
      if constexpr (kTransposedA)                                                              \
        FLASHMLA_WGMMA(N, REGISTERS, A, B, ACCUMULATE, "bf16", "1, " TRANSPOSED_B,             \
            "l"(a_desc), "l"(b_desc), "r"(accumulate));                                        \
      else                                                                                     \
        FLASHMLA_WGMMA(N, REGISTERS, A, B, ACCUMULATE, "bf16", "0, " TRANSPOSED_B,             \
            "l"(a_desc), "l"(b_desc), "r"(accumulate));                                        \
    } else {                                                                                   \
      if constexpr (kTransposedA)                                                              \
        FLASHMLA_WGMMA(N, REGISTERS, A, B, ACCUMULATE, "f16", "1, " TRANSPOSED_B,              \
            "l"(a_desc), "l"(b_desc), "r"(accumulate));                                        \
      else                                                                                     \
        FLASHMLA_WGMMA(N, REGISTERS, A, B, ACCUMULATE, "f16", "0, " TRANSPOSED_B,              \
            "l"(a_desc), "l"(b_desc), "r"(accumulate));                                        \
    }                                                                                          \
  }
FLASHMLA_WGMMA_SS(wgmma_ss, 16, 8, "%8", "%9", "%10", "0")
FLASHMLA_WGMMA_SS(wgmma_ss, 32, 16, "%16", "%17", "%18", "0")
FLASHMLA_WGMMA_SS(wgmma_ss, 64, 32, "%32", "%33", "%34", "0")
FLASHMLA_WGMMA_SS(wgmma_ss, 128, 64, "%64", "%65", "%66", "0")
FLASHMLA_WGMMA_SS(wgmma_ss_mn, 128, 64, "%64", "%65", "%66", "1")
FLASHMLA_WGMMA_SS(wgmma_ss_mn, 256, 128, "%128", "%129", "%130", "1")
// clang-format on
#undef FLASHMLA_WGMMA
#undef FLASHMLA_WGMMA_RS
#undef FLASHMLA_WGMMA_SS

}  // namespace flashmla::sm90
