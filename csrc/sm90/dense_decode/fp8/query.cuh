// The queries of a piece, by the score warps: from global memory, scaled, to where products read
// them.
#pragma once

#include "sm90/attention/partial.cuh"
#include "sm90/dense_decode/fp8/shared_storage.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

// Four pairs of bf16 queries, times a power of two, in f16 or bf16.
template <typename T>
__device__ __forceinline__ uint4 scale_queries(const uint32_t (&pairs)[4], float factor) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    words[j] = pack<T>(__uint_as_float(pairs[j] << 16) * factor,
                       __uint_as_float(pairs[j] & 0xffff0000) * factor);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Which side multiplies with a unit of sixteen columns: 0 with the first half of the latent columns
// and of the rope, 1 with the second ones.
__device__ __forceinline__ int side_of_unit(int unit) {
  return unit < kValueDim / 16 ? unit / (kValueDim / 32) : unit / 2 % 2;
}

// Brings a piece's queries, divided by a power of two so that their largest is just within f16;
// infinities and NaN do not count. smem.score_scale makes up for it. Code columns come in f16 and
// permuted within each sixteen as convert_keys permutes the keys': column pair 2t to place t, 2t +
// 1 to t + 4. A rope of 16-bit columns stays bf16. By all score warps, once no products are under
// way.
template <typename Format, int kRows>
__device__ __forceinline__ void take_query(const KernelArgs& args,
                                           SharedStorage<Format, kRows>& smem, int sequence) {
  constexpr int kUnits = kHeadDim / 16;  // of a row: 32 bytes each
  const int thread = reread_thread(), count = smem.row_tile.count;
  const auto* const q = reinterpret_cast<const uint4*>(
      args.q + (int64_t{sequence} * args.rows + smem.row_tile.first) * (kHeadDim * 2));
  constexpr int kTurns = (kRows * kUnits + kRoleThreads - 1) / kRoleThreads;
  constexpr int kKept = kTurns < 6 ? kTurns : 6;                       // as many as registers hold
  if (thread == 0 && owns_work(smem.begin, smem.end, sequence + 1)) {  // the next ones to L2
    prefetch_bulk(q + int64_t{args.rows} * (2 * kUnits), count * (kHeadDim * 2));
  }
  const auto load_half = [&](int turn, int half) {
    const int i = turn * kRoleThreads + thread;
    return i < count * kUnits ? q[2 * i + half] : uint4{};
  };
  uint4 v[kKept][2];  // all at once: they come from far
  uint32_t peak = 0;
#pragma unroll
  for (int turn = 0; turn < kKept; ++turn) {
    v[turn][0] = load_half(turn, 0);
    v[turn][1] = load_half(turn, 1);
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 some = turn < kKept ? v[turn % kKept][half] : load_half(turn, half);
      const uint32_t words[4] = {some.x, some.y, some.z, some.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t magnitude = words[j] & 0x7fff7fff;
        peak = __vmaxu2(peak, magnitude & __vcmpltu2(magnitude, 0x7f807f80));
      }
    }
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    peak = __vmaxu2(peak, __shfl_xor_sync(~0u, peak, lane));
  }
  if (reread_thread() % 32 == 0) smem.query_peak[reread_thread() / 32] = peak;
  named_barrier_sync(kPairBarrier, kRoleThreads);
#pragma unroll
  for (int warp = 0; warp < kRoleWarps; ++warp) peak = __vmaxu2(peak, smem.query_peak[warp]);
  int exponent = int(max(peak & 0xffff, peak >> 16) >> 7) - 127;
  exponent = min(max(exponent - 14, -100), 112);
  const float factor = power_of_two(-exponent);
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * kRoleThreads + reread_thread();
    if (i >= kRows * kUnits) break;
    const int unit = i % kUnits, row = i / kUnits ^ side_of_unit(unit) * (kRows / kSides);
    const uint4 low = turn < kKept ? v[turn % kKept][0] : load_half(turn, 0);
    const uint4 high = turn < kKept ? v[turn % kKept][1] : load_half(turn, 1);
    const bool rope = Format::kScales && unit >= kValueDim / 16;
    uint4 first, second;
    if (rope) {
      const uint32_t a[4] = {low.x, low.y, low.z, low.w}, b[4] = {high.x, high.y, high.z, high.w};
      first = scale_queries<__nv_bfloat16>(a, factor);
      second = scale_queries<__nv_bfloat16>(b, factor);
    } else {
      const uint32_t a[4] = {low.x, low.z, high.x, high.z}, b[4] = {low.y, low.w, high.y, high.w};
      first = scale_queries<__half>(a, factor);
      second = scale_queries<__half>(b, factor);
    }
    const uint32_t target = smem_address(smem.query[unit / 4]);
    store_shared(target + swizzled_offset(row, unit % 4 * 2), first);
    store_shared(target + swizzled_offset(row, unit % 4 * 2 + 1), second);
  }
  if (reread_thread() == 0) {
    float scale = args.scale_log2 * power_of_two(exponent);
    if constexpr (!Format::kScales) scale *= *args.kv_scale;
    smem.score_scale = scale;
  }
  fence_async_proxy();
  named_barrier_sync(kPairBarrier, kRoleThreads);
}

}  // namespace flashmla::sm90::dense_decode::fp8
