#include "cpu/attend/attend_piece.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/elements.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FLASHMLA_X86_DISPATCH 1
#endif

// Before a loop whose index picks a register.
#ifdef __clang__
#define FLASHMLA_UNROLL _Pragma("unroll")
#else
#define FLASHMLA_UNROLL _Pragma("GCC unroll 16")
#endif

// The same source for each instruction set, with vectors as wide as its registers.
#if FLASHMLA_X86_DISPATCH

#define FLASHMLA_ISA avx512
#define FLASHMLA_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define FLASHMLA_LANES 16
#define FLASHMLA_REGISTERS 32
#include "cpu/attend/attend_piece_simd.h"

#define FLASHMLA_ISA avx2
#define FLASHMLA_TARGET __attribute__((target("avx2,fma")))
#define FLASHMLA_LANES 8
#define FLASHMLA_REGISTERS 16
#include "cpu/attend/attend_piece_simd.h"

#endif

#define FLASHMLA_ISA baseline
#define FLASHMLA_TARGET
#define FLASHMLA_LANES 4
#if defined(__aarch64__)
#define FLASHMLA_REGISTERS 32
#else
#define FLASHMLA_REGISTERS 16
#endif
#include "cpu/attend/attend_piece_simd.h"

namespace flashmla::cpu {
namespace {

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

void PieceState::resize(int d_qk, int d_v) {
  const int stride = round_up(d_qk, kAlignment) + kAlignment;  // one more: no power of two
  if (stride == key_stride && round_up(d_v, kAlignment) == acc_stride) return;
  key_stride = stride;
  acc_stride = round_up(d_v, kAlignment);
  const size_t size = size_t{kMaxRows} * (key_stride + kSplitTile + 3 + acc_stride) +
                      size_t{kSplitTile} * key_stride;
  storage_.assign(size + kAlignment, 0.0f);

  constexpr uintptr_t kBytes = kAlignment * sizeof(float);
  const auto start = reinterpret_cast<uintptr_t>(storage_.data());
  float* next = storage_.data() + ((kBytes - start % kBytes) % kBytes) / sizeof(float);
  const auto take = [&next](size_t n) { return std::exchange(next, next + n); };
  query = take(size_t{kMaxRows} * key_stride);
  tile = take(size_t{kSplitTile} * key_stride);
  weights = take(size_t{kMaxRows} * kSplitTile);
  decay = take(kMaxRows);
  row_max = take(kMaxRows);
  row_sum = take(kMaxRows);
  acc = take(size_t{kMaxRows} * acc_stride);
}

void attend_piece(const DenseDecodeParams& params, const PieceTask& task, PieceState& state) {
#if FLASHMLA_X86_DISPATCH
  static const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx512) return avx512::attend_piece(params, task, state);
  if (has_avx2) return avx2::attend_piece(params, task, state);
#endif
  baseline::attend_piece(params, task, state);
}

}  // namespace flashmla::cpu
