// The value warpgroups: O^T += V^T P^T, whose rows are value columns and whose columns are heads.
// A warpgroup has kCount tiles of 64 value columns; a warp sixteen columns of each.
#pragma once

#include "sm90/formats/codes.cuh"
#include "sm90/formats/fragments.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/sparse_decode/narrow/formats.cuh"
#include "sm90/sparse_decode/narrow/gather.cuh"
#include "sm90/sparse_decode/narrow/output.cuh"
#include "sm90/sparse_decode/softmax.cuh"

namespace flashmla::sm90::sparse::narrow {

__device__ __forceinline__ uint2 load_pair(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

// What the factors of 16 tokens leave of large scales. scales: the first token's scale in its row.
template <typename Format>
__device__ __forceinline__ void multiply_excess(uint32_t* a, uint32_t scales) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float scale[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) scale[j] = load_scale(scales + (k * 8 + j) * Format::kRowBytes);
    const uint32_t excess = pack<__nv_bfloat16>(excess_of(scale[0]), excess_of(scale[1]));
    a[2 * k] = multiply_bf16x2(a[2 * k], excess);
    a[2 * k + 1] = multiply_bf16x2(a[2 * k + 1], excess);
  }
}

template <int kRows, int kCount>
__device__ __forceinline__ void rescale_output(float (&o)[kCount][kRows / 2],
                                               const uint8_t* rescale) {
  const int thread = reread_thread();
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    const float factor = rescale_factor(rescale[query_row(thread, i)]);
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      o[m][element(i, 0)] *= factor;
      o[m][element(i, 1)] *= factor;
    }
  }
}

// Adds a tile's products, once the probabilities are there. raw: of the tile's first 32 tokens and
// the warp's first columns. Frees the ring's slots as soon as their bytes are in registers.
template <typename Format, int kRows, int kCount, bool kLargeScales>
__device__ __forceinline__ void add_products(SharedStorage<Format, kRows>& smem, int stage,
                                             uint32_t rows, uint32_t (&raw)[4],
                                             uint32_t probabilities,
                                             float (&o)[kCount][kRows / 2]) {
  using T = __nv_bfloat16;
  const int thread = reread_thread(), lane = thread % 32;
  const int first_group = first_value_tile<kCount>(thread) / 2;
  const uint32_t scales = smem_address(smem.scales[stage][first_group]) + lane % 4 * 16;
  uint32_t a[2][4];
#pragma unroll
  for (int m = 0; m < kCount; ++m) pin_registers(o[m]);
#pragma unroll
  for (int step = 0; step < 2 * kCount; ++step) {
    const int half = step / kCount, m = step % kCount, next = step + 1;
    const int group = m * value_tile_stride(kCount) / 2;  // from first_group on
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint2 factor = load_pair(scales + group * (kTileTokens * 2) + half * 64 + k * 8);
      const uint32_t factors[2] = {factor.x, factor.y};
      if (step + k >= 1) wgmma_wait<1>();
      convert_values(a[k], raw + 2 * k, factors);
      if constexpr (kLargeScales) {
        multiply_excess<Format>(a[k], smem_address(smem.ring[stage][2 * half + k]) +
                                          lane % 4 * 2 * Format::kRowBytes + Format::kScaleOffset +
                                          (first_group + group) * 4);
      }
      if (k == 1 && m == kCount - 1) {
        __syncwarp();
        if (lane < 2) mbarrier_arrive(smem_address(&smem.empty[stage][2 * half + lane]));
      }
      if (k == 1 && next < 2 * kCount) {
        load_values(raw, rows + next / kCount * 32 * Format::kRowBytes +
                             next % kCount * value_tile_stride(kCount) * 64);
      }
      wgmma_fence();
      wgmma_rs<T>(o[m], a[k], descriptor(probabilities + 4 * half + 2 * k), 1);
      wgmma_commit();
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int m = 0; m < kCount; ++m) pin_registers(o[m]);
}

// A tile's share of the output.
template <typename Format, int kRows, int kCount>
__device__ __forceinline__ void add_tile(SharedStorage<Format, kRows>& smem,
                                         RingPosition<kStages> ring, BufferPosition buffer,
                                         float (&o)[kCount][kRows / 2]) {
  const int thread = reread_thread(), lane = thread % 32;
#pragma unroll
  for (int i = 0; i < kTileSlots; ++i) {
    mbarrier_wait(smem_address(&smem.full[ring.stage][i]), ring.parity);
  }
  const uint32_t rows = smem_address(smem.ring[ring.stage][0]) + lane * Format::kRowBytes +
                        first_value_tile<kCount>(thread) * 64 + thread / 32 % kWarps * 16;
  uint32_t raw[4];
  load_values(raw, rows);
  mbarrier_wait(smem_address(&smem.probabilities_full[buffer.slot()]), buffer.parity());
  const uint32_t flags = *reinterpret_cast<const uint32_t*>(smem.flags[buffer.slot()]);
  if (flags & kRescaled) rescale_output<kRows, kCount>(o, smem.rescale[buffer.slot()]);
  const uint32_t probabilities = operand_at(smem.probabilities[buffer.slot()]);
  if (flags & (kHasLargeScales * 0x01010101u)) {
    add_products<Format, kRows, kCount, true>(smem, ring.stage, rows, raw, probabilities, o);
  } else {
    add_products<Format, kRows, kCount, false>(smem, ring.stage, rows, raw, probabilities, o);
  }
  if (lane == 0) mbarrier_arrive(smem_address(&smem.probabilities_empty[buffer.slot()]));
  __syncwarp();
}

template <typename T, typename Format, int kRows, int kCount, bool kGathers>
__device__ void run_values(const KernelArgs& args, SharedStorage<Format, kRows>& smem) {
  RingPosition<kStages> ring;
  BufferPosition buffer;
  uint32_t sums_parity = 0;
  if constexpr (kGathers) start_gather<Format, kRows>(args, smem);
  int freed = 0;  // stages of the ring, since it was last filled

  for (int query = smem.begin.sequence; owns_work(smem.begin, smem.end, query); ++query) {
    const Piece piece = piece_of(smem.begin, smem.end, query, load_length(args.main, query));
    const bool empty = piece.tile_begin >= piece.tile_end;
    float o[kCount][kRows / 2] = {};
    if (!empty) {
#pragma unroll
      for (int i = 0; i < kQueryItems; ++i) ring.advance();
      freed += kQueryItems;
    }
    for (int tiles = piece.tile_end - piece.tile_begin; tiles > 0; --tiles) {
      // Here alone: the code is long, and instructions are fetched as bytes are.
      if constexpr (kGathers) fill_ring<Format, kRows>(args, smem, freed);
      add_tile<Format, kRows, kCount>(smem, ring, buffer, o);
      freed = 1;
      ring.advance();
      ++buffer.turn;
    }
    const bool partial = piece.continued || piece.unfinished;
    const HeadTile heads = HeadTile::of_block<kRows>(args);
    if (!empty) {
      mbarrier_wait(smem_address(&smem.sums_full), sums_parity);
      sums_parity ^= 1;
    }
    if (partial) {
      store_partial<kCount>(args, smem, o, heads, empty, piece_slot(blockIdx.y, piece.continued));
    } else {
      store_result<T, kCount>(args, smem, o, heads, empty, query);
    }
    __syncwarp();
    if (!empty && threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&smem.sums_empty));
  }
}

}  // namespace flashmla::sm90::sparse::narrow
