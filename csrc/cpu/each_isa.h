// Includes FLASHMLA_SIMD_SOURCE once for each instruction set, with vectors as wide as its
// registers, having defined
//   FLASHMLA_ISA        namespace
//   FLASHMLA_TARGET     function attribute that turns the instruction set on
//   FLASHMLA_LANES      floats in a register
//   FLASHMLA_REGISTERS  vector registers
//   FLASHMLA_UNROLL     before a loop whose index picks a register
// That source uses the compilers' vector extensions only. Functions from elsewhere stay outside the
// target attribute, so no function that needs a newer CPU can stand in for an ordinary one. One
// .cc file includes this, once.

#ifdef __clang__
#define FLASHMLA_UNROLL _Pragma("unroll")
#else
#define FLASHMLA_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__x86_64__) && defined(__GNUC__)

#define FLASHMLA_ISA avx512
#define FLASHMLA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define FLASHMLA_LANES 16
#define FLASHMLA_REGISTERS 32
#include FLASHMLA_SIMD_SOURCE
#undef FLASHMLA_ISA
#undef FLASHMLA_TARGET
#undef FLASHMLA_LANES
#undef FLASHMLA_REGISTERS

#define FLASHMLA_ISA avx2
#define FLASHMLA_TARGET __attribute__((target("avx2,fma")))
#define FLASHMLA_LANES 8
#define FLASHMLA_REGISTERS 16
#include FLASHMLA_SIMD_SOURCE
#undef FLASHMLA_ISA
#undef FLASHMLA_TARGET
#undef FLASHMLA_LANES
#undef FLASHMLA_REGISTERS

// Calls a function of that source in the best version that this CPU runs, and returns.
#define FLASHMLA_RUN_BEST_ISA(call)                                                             \
  static const bool has_avx512 =                                                                \
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                \
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");                 \
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); \
  if (has_avx512) return avx512::call;                                                          \
  if (has_avx2) return avx2::call;                                                              \
  return baseline::call

#else
#define FLASHMLA_RUN_BEST_ISA(call) return baseline::call
#endif

#define FLASHMLA_ISA baseline
#define FLASHMLA_TARGET
#define FLASHMLA_LANES 4
#if defined(__aarch64__)
#define FLASHMLA_REGISTERS 32
#else
#define FLASHMLA_REGISTERS 16
#endif
#include FLASHMLA_SIMD_SOURCE
#undef FLASHMLA_ISA
#undef FLASHMLA_TARGET
#undef FLASHMLA_LANES
#undef FLASHMLA_REGISTERS
