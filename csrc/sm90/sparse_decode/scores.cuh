// The score warpgroup: S^T = K Q^T, whose 64 rows are a tile's tokens and whose columns are heads;
// softmax over the tokens; P^T for the value warpgroups. A warp has 16 tokens, a slot of the ring.
// Registers named by `i` belong to a thread's query rows.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/sparse_decode/convert.cuh"
#include "sm90/sparse_decode/formats.cuh"
#include "sm90/sparse_decode/products.cuh"
#include "sm90/sparse_decode/shared_storage.cuh"
#include "sm90/sparse_decode/softmax.cuh"
#include "sm90/sparse_decode/work.cuh"

namespace flashmla::sm90::sparse {

// The power of two by which a tile's queries are divided, so that their largest is just within f16.
// All its items are in the ring. Infinities and NaN do not count.
template <typename Format, int kRows>
__device__ __forceinline__ int find_query_exponent(SharedStorage<Format, kRows>& smem, int count,
                                                   RingPosition<kStages<kRows>> ring) {
  constexpr int kUnits = Format::kHeadDim / 8;  // of a head: 16 bytes each
  constexpr int kItemHeads = kSlotHeads<kRows> * kTileSlots;
  const int thread = reread_thread();
  uint32_t peak = 0;
#pragma unroll 1
  for (int item = 0; item < kQueryItems<kRows>; ++item) {
#pragma unroll
    for (int slot = 0; slot < kTileSlots; ++slot) {
      mbarrier_wait(smem_address(&smem.full[ring.stage][slot]), ring.parity);
    }
    const int heads = min(count - item * kItemHeads, kItemHeads);
#pragma unroll 4
    for (int i = thread; i < heads * kUnits; i += kWarpgroupThreads) {
      const int head = i / kUnits;
      const uint4 v = load_shared(smem_address(smem.ring[ring.stage][head / kSlotHeads<kRows>]) +
                                  (head % kSlotHeads<kRows> * kUnits + i % kUnits) * 16);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t magnitude = words[j] & 0x7fff7fff;
        peak = __vmaxu2(peak, magnitude & __vcmpltu2(magnitude, 0x7f807f80));
      }
    }
    ring.advance();
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    peak = __vmaxu2(peak, __shfl_xor_sync(~0u, peak, lane));
  }
  if (thread % 32 == 0) smem.query_peak[thread / 32] = peak;
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) peak = __vmaxu2(peak, smem.query_peak[warp]);
  const int exponent = int(max(peak & 0xffff, peak >> 16) >> 7) - 127;
  return min(max(exponent - 14, -100), 112);
}

// Four pairs of bf16 queries, times a power of two, in f16 or bf16.
template <typename T>
__device__ __forceinline__ uint4 scale_queries(uint4 v, float factor) {
  uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    words[j] = pack<T>(__uint_as_float(words[j] << 16) * factor,
                       __uint_as_float(words[j] & 0xffff0000) * factor);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Takes a piece's queries out of the ring, times `factor`: the latent columns in f16, the rope in
// bf16. Latent columns are permuted within each sixteen as convert_keys permutes the keys': column
// pair 2t to place t, 2t + 1 to t + 4.
template <typename Format, int kRows>
__device__ __forceinline__ void take_query(SharedStorage<Format, kRows>& smem, int count,
                                           float factor, RingPosition<kStages<kRows>>& ring) {
  constexpr int kUnits = Format::kHeadDim / 16;  // of a head: 32 bytes each
  constexpr int kItemHeads = kSlotHeads<kRows> * kTileSlots;
  const int thread = reread_thread();
#pragma unroll 1
  for (int item = 0; item < kQueryItems<kRows>; ++item) {
    for (int i = thread; i < kItemHeads * kUnits; i += kWarpgroupThreads) {
      const int head = i / kUnits, unit = i % kUnits;
      const int row = item * kItemHeads + head;
      const uint32_t source = smem_address(smem.ring[ring.stage][head / kSlotHeads<kRows>]) +
                              (head % kSlotHeads<kRows> * kUnits + unit) * 32;
      uint4 low = {}, high = {};
      if (row < count) {
        low = load_shared(source);
        high = load_shared(source + 16);
      }
      const uint32_t target = smem_address(smem.query[unit / 4]);
      if (Format::kRope && unit / 4 == Format::kHeadDim / kChunkColumns - 1) {
        low = scale_queries<__nv_bfloat16>(low, factor);
        high = scale_queries<__nv_bfloat16>(high, factor);
      } else {
        const uint4 even = {low.x, low.z, high.x, high.z}, odd = {low.y, low.w, high.y, high.w};
        low = scale_queries<__half>(even, factor);
        high = scale_queries<__half>(odd, factor);
      }
      store_shared(target + swizzled_offset(row, unit % 4 * 2), low);
      store_shared(target + swizzled_offset(row, unit % 4 * 2 + 1), high);
    }
    // On behalf of the value warps, for which queries are not.
    __syncwarp();
    if (thread % 32 < kValueWarps / kWarps) {
#pragma unroll
      for (int slot = 0; slot < kTileSlots; ++slot) {
        mbarrier_arrive(smem_address(&smem.empty[ring.stage][slot]));
      }
    }
    ring.advance();
  }
  fence_async_proxy();
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
}

// Puts the scales of this warp's tokens where they are read: bf16 for the value warps; relative
// ones for this warp. Returns whether there are scales that one factor does not hold. score_scale:
// what all products are to be multiplied with.
template <typename Format, int kRows>
__device__ __forceinline__ bool prepare_scales(SharedStorage<Format, kRows>& smem, int stage,
                                               float score_scale) {
  static_assert(Format::kScaleGroups == 4);
  const int thread = reread_thread(), warp = thread / 32, lane = thread % 32;
  const int token = lane / 2, group = lane % 2 * 2, row = warp * kSlotTokens + token;
  const uint32_t address = smem_address(smem.ring[stage][warp]) + token * Format::kRowBytes +
                           Format::kScaleOffset + group * 4;
  const float scale[2] = {load_scale(address), load_scale(address + 4)};
  float largest = fmaxf(fabsf(scale[0]), fabsf(scale[1]));
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  const int exponent = token_exponent(largest);
  const float inverse = power_of_two(-exponent);
  const int place = warp / 2 * 32 + token % 8 / 2 * 8 + (warp % 2 * 2 + token / 8) * 2 + token % 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    smem.scales[stage][group + i][place] =
        __bfloat16_as_ushort(__float2bfloat16_rn(clamp_scale(scale[i]) * kPlaced));
    smem.key_scales[row][group + i] = f16_twice(scale[i] * inverse);
  }
  if (group == 0) {
    smem.rope_scale[row] = bf16_twice(inverse);
    smem.score_scale[row] = power_of_two(exponent) * score_scale;
  }
  __syncwarp();
  return __any_sync(~0u, is_large(scale[0]) || is_large(scale[1]));
}

// Raw bytes of 64 latent columns of the warp's tokens: of each lane row g = lane / 4, row g + 8 of
// the first sixteen columns, then of the next sixteen.
__device__ __forceinline__ void load_keys(uint32_t (&raw)[8], uint32_t rows, int chunk) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    load_matrix_x4(*reinterpret_cast<uint32_t (*)[4]>(raw + 4 * i), rows + chunk * 64 + i * 32);
  }
}

// A fragments of 64 columns, k16 by k16.
__device__ __forceinline__ void convert_keys(uint32_t (&a)[16], const uint32_t (&raw)[8],
                                             const uint32_t (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = i % 2;
    a[i / 2 * 4 + row] = multiply_f16x2(codes_to_f16<false>(raw[i]), factor[row]);
    a[i / 2 * 4 + row + 2] = multiply_f16x2(codes_to_f16<true>(raw[i]), factor[row]);
  }
}

template <typename Format, int kRows>
__device__ __forceinline__ void compute_scores(float (&s)[kRows / 2],
                                               const SharedStorage<Format, kRows>& smem,
                                               int stage) {
  constexpr int kLatentColumns = 512, kGroupColumns = kLatentColumns / Format::kScaleGroups;
  constexpr int kQueryStep = kRows * kChunkRowBytes / 16;  // of an operand, for 64 columns
  const int thread = reread_thread(), lane = thread % 32;
  const int token = thread / 32 * kSlotTokens + lane / 4;
  uint32_t rows =
      smem_address(smem.ring[stage][thread / 32]) + lane % 16 * Format::kRowBytes + lane / 16 * 16;
  uint32_t a[2][16], raw[8];
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) s[i] = 0.0f;
  load_keys(raw, rows, 0);
  pin_registers(s);
#pragma unroll 1
  for (int group = 0; group < Format::kScaleGroups; ++group) {
    const uint32_t query = operand_at(smem.query[0]) + group * (kGroupColumns / 64) * kQueryStep;
    const uint32_t factor[2] = {smem.key_scales[token][group], smem.key_scales[token + 8][group]};
#pragma unroll
    for (int c = 0; c < kGroupColumns / 64; ++c) {
      uint32_t (&keys)[16] = a[c % 2];
      wgmma_wait<1>();
      convert_keys(keys, raw, factor);
      load_keys(raw, rows, c + 1);  // after the last columns bytes that no one uses
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma_rs<__half>(s, keys + 4 * k, descriptor(query + c * kQueryStep + 2 * k), 1);
      }
      wgmma_commit();
    }
    rows += kGroupColumns;
  }
  if constexpr (Format::kRope) {
    const uint32_t query = operand_at(smem.query[kLatentColumns / 64]);
    const uint32_t factor[2] = {smem.rope_scale[token], smem.rope_scale[token + 8]};
    wgmma_wait<1>();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      load_matrix_x4(*reinterpret_cast<uint32_t (*)[4]>(a[0] + 4 * k),
                     rows + Format::kRopeOffset - kLatentColumns + k * 32);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) a[0][i] = multiply_bf16x2(a[0][i], factor[i % 2]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      wgmma_rs<__nv_bfloat16>(s, a[0] + 4 * k, descriptor(query + 2 * k), 1);
    }
    wgmma_commit();
  }
  wgmma_wait<0>();
  pin_registers(s);
}

// Combines what all threads of the warpgroup have of a row. Ends with all warps having read.
template <int kRows, typename Combine>
__device__ __forceinline__ void combine_rows(float (&exchange)[kWarps][kRows],
                                             float (&x)[kThreadRows<kRows>], Combine combine) {
  const int thread = reread_thread();
#pragma unroll
  for (int lane = 4; lane <= 16; lane *= 2) {
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; ++i) {
      x[i] = combine(x[i], __shfl_xor_sync(~0u, x[i], lane));
    }
  }
  if (thread % 32 < 4) {
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; i += 2) {
      *reinterpret_cast<float2*>(&exchange[thread / 32][query_row(thread, i)]) = {x[i], x[i + 1]};
    }
  }
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    x[i] = combine(combine(exchange[0][query_row(thread, i)], exchange[1][query_row(thread, i)]),
                   combine(exchange[2][query_row(thread, i)], exchange[3][query_row(thread, i)]));
  }
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
}

// Moves references to a tile's largest scores, which `peak` has of this thread, and its sums
// with them. By what power of two the output is to be divided goes to `rescale`.
template <typename Format, int kRows>
__device__ __forceinline__ void raise_references(SharedStorage<Format, kRows>& smem,
                                                 float (&peak)[kThreadRows<kRows>],
                                                 uint8_t* rescale) {
  const int thread = reread_thread();
  combine_rows<kRows>(smem.exchange, peak, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    float moved = smem.reference[query_row(thread, i)];
    const int power = raise_reference(moved, peak[i]);
    reinterpret_cast<float*>(&smem.sums[i / 4][thread])[i % 4] *= rescale_factor(power);
    peak[i] = moved;
    if (thread < 4) rescale[query_row(thread, i)] = power;
  }
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);  // all have read the references
  if (thread < 4) {
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; ++i) {
      smem.reference[query_row(thread, i)] = peak[i];
      smem.offset[query_row(thread, i)] = finite_reference(peak[i]);
    }
  }
  named_barrier_sync(kScoreBarrier, kWarpgroupThreads);
}

// Stores probabilities as wgmma's B operand: K-major rows of 64 tokens in the 128-byte swizzle.
template <int kRows>
__device__ __forceinline__ void store_probabilities(const float (&p)[kRows / 2], uint32_t target) {
  const int thread = reread_thread(), lane = thread % 32;
  const int matrix = lane / 8;  // tokens % 16 / 8, rows % 16 / 8
  const int piece = thread / 32 * 2 + matrix % 2;
#pragma unroll
  for (int rows = 0; rows < kRows; rows += 16) {
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = rows / 4 + j / 2 * 2;
      packed[j] = pack<__nv_bfloat16>(p[element(i, j % 2)], p[element(i + 1, j % 2)]);
    }
    store_matrix_x4_trans(target + swizzled_offset(rows + matrix / 2 * 8 + lane % 8, piece),
                          packed[0], packed[1], packed[2], packed[3]);
  }
}

// Softmax of a tile's scores s, which become probabilities. Returns whether references moved.
template <typename Format, int kRows>
__device__ __forceinline__ bool make_probabilities(SharedStorage<Format, kRows>& smem,
                                                   float (&s)[kRows / 2], uint32_t valid,
                                                   bool first, uint8_t* rescale) {
  constexpr int kMine = kThreadRows<kRows>;
  const int thread = reread_thread(), token = thread % 32 / 4;
  // Products and differences are rounded one by one, so that the largest of huge scores, less
  // itself, is 0.
  const int row = thread / 32 * kSlotTokens + token;
  const float scale[2] = {smem.score_scale[row], smem.score_scale[row + 8]};
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
#pragma unroll
    for (int m = 0; m < 2; ++m) s[element(i, m)] = __fmul_rn(s[element(i, m)], scale[m]);
  }
  if (valid != (1 << kSlotTokens) - 1) {
    const bool seen[2] = {(valid >> token & 1) != 0, (valid >> (token + 8) & 1) != 0};
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if (!seen[m]) s[element(i, m)] = -INFINITY;
      }
    }
  }
  float peak[kMine], highest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    peak[i] = fmaxf(s[element(i, 0)], s[element(i, 1)]);
    highest = fmaxf(highest, peak[i] - smem.offset[query_row(thread, i)]);
  }
  const bool raise =
      named_barrier_any(kScoreBarrier, kWarpgroupThreads, first || highest > kLazyRescale);
  if (raise) raise_references<Format, kRows>(smem, peak, rescale);
#pragma unroll
  for (int i = 0; i < kMine; i += 4) {
    float4 sum = smem.sums[i / 4][thread];
    float* const sums = &sum.x;
#pragma unroll
    for (int j = i; j < i + 4; ++j) {
      const float offset = smem.offset[query_row(thread, j)];
      float(&low) = s[element(j, 0)], (&high) = s[element(j, 1)];
      low = exp2_approx(__fsub_rn(low, offset));
      high = exp2_approx(__fsub_rn(high, offset));
      sums[j - i] += low + high;
    }
    smem.sums[i / 4][thread] = sum;
  }
  return raise && !first;
}

// Ends a piece: its log-sum-exps, and the factors of its outputs. index: query token or, if
// partial, workspace slot. By the first four threads, which have all rows.
template <typename Format, int kRows>
__device__ __forceinline__ void finish_rows(const KernelArgs& args,
                                            SharedStorage<Format, kRows>& smem, HeadTile heads,
                                            const float (&sum)[kThreadRows<kRows>], bool partial,
                                            int index, uint32_t sums_parity) {
  mbarrier_wait(smem_address(&smem.sums_empty), sums_parity);
  const int thread = reread_thread();
  float* target = (partial ? args.lse_accum : args.lse) + int64_t{index} * args.h_q + heads.first;
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    const int row = query_row(thread, i);
    const float lse = row_lse_log2(smem.reference[row], sum[i]);
    float inverse = sum[i] > 0.0f ? reciprocal_approx(sum[i]) : 0.0f;
    if (row < heads.count) {
      target[row] = partial ? lse : lse * kLn2;
      if (!partial && args.attn_sink != nullptr && sum[i] > 0.0f) {
        inverse *= sink_share(lse, args.attn_sink[heads.first + row]);
      }
    }
    smem.inverse_sum[row] = inverse;
  }
  mbarrier_arrive(smem_address(&smem.sums_full));
}

__device__ __forceinline__ void store_empty_lse(const KernelArgs& args, HeadTile heads,
                                                bool partial, int index) {
  float* target = (partial ? args.lse_accum : args.lse) + int64_t{index} * args.h_q + heads.first;
  for (int row = reread_thread(); row < heads.count; row += kWarpgroupThreads)
    target[row] = -INFINITY;
}

template <typename Format, int kRows>
__device__ void run_scores(const KernelArgs& args, SharedStorage<Format, kRows>& smem) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  RingPosition<kStages<kRows>> ring;
  BufferPosition buffer;  // of probabilities
  uint32_t sums_parity = 1;

  for (int query = smem.begin.sequence; owns_work(smem.begin, smem.end, query); ++query) {
    const HeadTile heads = HeadTile::of_block<kRows>(args);
    const Piece piece = piece_of(smem.begin, smem.end, query, load_length(args.main, query));
    const bool partial = piece.continued || piece.unfinished;
    const int index = partial ? piece_slot(blockIdx.y, piece.continued) : query;
    if (piece.tile_begin >= piece.tile_end) {
      store_empty_lse(args, heads, partial, index);
      continue;
    }
    // The warp that read the last piece's at its end; seen by all once the queries are taken.
    if (warp == 0) {
      for (int row = lane; row < kRows; row += 32) {
        smem.reference[row] = -INFINITY;
        smem.offset[row] = 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows> / 4; ++i) smem.sums[i][threadIdx.x] = float4{};
    const int exponent = find_query_exponent(smem, heads.count, ring);
    take_query(smem, heads.count, power_of_two(-exponent), ring);
    const float score_scale = args.scale_log2 * power_of_two(exponent);

    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      mbarrier_wait(smem_address(&smem.full[ring.stage][warp]), ring.parity);
      const bool large_scales = named_barrier_any(kScoreBarrier, kWarpgroupThreads,
                                                  prepare_scales(smem, ring.stage, score_scale));
      float s[kRows / 2];
      compute_scores<Format, kRows>(s, smem, ring.stage);
      const uint32_t valid = smem.valid[ring.stage][warp];
      // Of the buffer's last round; passes at once in the first.
      mbarrier_wait(smem_address(&smem.probabilities_empty[buffer.slot()]), buffer.parity() ^ 1);
      const bool rescaled = make_probabilities<Format, kRows>(
          smem, s, valid, tile == piece.tile_begin, smem.rescale[buffer.slot()]);
      if (lane == 0) {
        smem.flags[buffer.slot()][warp] =
            (rescaled ? kRescaled : 0) | (large_scales ? kHasLargeScales : 0);
      }
      store_probabilities<kRows>(s, smem_address(smem.probabilities[buffer.slot()]));
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(smem_address(&smem.probabilities_full[buffer.slot()]));
      ring.advance();
      ++buffer.turn;
    }

    float sum[kThreadRows<kRows>];
#pragma unroll
    for (int i = 0; i < kThreadRows<kRows>; ++i) {
      sum[i] = reinterpret_cast<const float*>(&smem.sums[i / 4][threadIdx.x])[i % 4];
    }
    combine_rows<kRows>(smem.exchange, sum, [](float a, float b) { return a + b; });
    if (threadIdx.x < 4) {
      finish_rows<Format, kRows>(args, smem, heads, sum, partial, index, sums_parity);
    }
    sums_parity ^= 1;
    __syncwarp();
  }
}

}  // namespace flashmla::sm90::sparse
