// The indexer's products: D[64 x N] (+)= A[64 x K] * B[N x K], f32, K-major operands. QGMMA takes
// both as e4m3 from shared memory, 32 columns at a time; with bf16 queries A is the keys, converted
// in registers, 16 columns at a time. accumulate = 0 overwrites D.
#pragma once

#include <cstdint>

#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::index_scores {

// clang-format off
#define FLASHMLA_MULTIPLY(N, REGISTERS, A, B, ACCUMULATE)                                      \
  __device__ __forceinline__ void multiply(float (&d)[REGISTERS], uint64_t a_desc,             \
                                           uint64_t b_desc, int accumulate) {                  \
    asm volatile(                                                                              \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n"                                \
        "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {"                           \
        FLASHMLA_D##REGISTERS "}, " A ", " B ", p, 1, 1;\n}\n"                                 \
        : FLASHMLA_OUT##REGISTERS : "l"(a_desc), "l"(b_desc), "r"(accumulate));                \
  }
FLASHMLA_MULTIPLY(32, 16, "%16", "%17", "%18")
FLASHMLA_MULTIPLY(64, 32, "%32", "%33", "%34")
FLASHMLA_MULTIPLY(128, 64, "%64", "%65", "%66")
FLASHMLA_MULTIPLY(256, 128, "%128", "%129", "%130")
// clang-format on
#undef FLASHMLA_MULTIPLY

template <int kRegisters>
__device__ __forceinline__ void multiply(float (&d)[kRegisters], const uint32_t (&a)[4],
                                         uint64_t b_desc, int accumulate) {
  wgmma_rs<__nv_bfloat16>(d, a, b_desc, accumulate);
}

}  // namespace flashmla::sm90::index_scores
