// The value warpgroups: O^T += V^T P^T, whose rows are value columns and whose columns are heads.
// A warpgroup has kCount tiles of 64 value columns from kFirst on; a warp sixteen of each.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/sparse_decode/convert.cuh"
#include "sm90/sparse_decode/formats.cuh"
#include "sm90/sparse_decode/gather.cuh"
#include "sm90/sparse_decode/output.cuh"
#include "sm90/sparse_decode/products.cuh"
#include "sm90/sparse_decode/softmax.cuh"

namespace flashmla::sm90::sparse {

// Raw bytes of the warp's sixteen columns of 32 tokens, by eights of tokens: of each lane columns
// 2g and 2g + 1, g = lane / 4, of tokens 2t and 2t + 1, t = lane % 4.
__device__ __forceinline__ void load_values(uint32_t (&raw)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw[0]), "=r"(raw[1]), "=r"(raw[2]), "=r"(raw[3])
               : "r"(address)
               : "memory");
}

// A fragments of 32 tokens, k16 by k16: row g of the warp's sixteen is column 2g, row g + 8 is
// column 2g + 1.
__device__ __forceinline__ void convert_values(uint32_t (&a)[8], const uint32_t (&raw)[4],
                                               const uint32_t (&factor)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t* fragment = a + k / 2 * 4 + k % 2 * 2;
    fragment[0] = multiply_bf16x2(place_codes<kBytes02>(raw[k]), factor[k]);
    fragment[1] = multiply_bf16x2(place_codes<kBytes13>(raw[k]), factor[k]);
  }
}

__device__ __forceinline__ uint2 load_pair(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

// What the factors of a slot's 16 tokens leave of large scales.
template <typename Format>
__device__ __forceinline__ void multiply_excess(uint32_t* a, uint32_t slot, int group) {
  const uint32_t scales = slot + reread_thread() % 4 * 2 * Format::kRowBytes + Format::kScaleOffset +
                          group * 4;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    float scale[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(scale[j])
                   : "r"(scales + (k * 8 + j) * Format::kRowBytes)
                   : "memory");
    }
    const uint32_t excess = pack<__nv_bfloat16>(excess_of(scale[0]), excess_of(scale[1]));
    a[k * 2] = multiply_bf16x2(a[k * 2], excess);
    a[k * 2 + 1] = multiply_bf16x2(a[k * 2 + 1], excess);
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

// Adds a tile's products. Frees the ring's slots as soon as their bytes are in registers.
template <typename Format, int kRows, int kFirst, int kCount>
__device__ __forceinline__ void add_products(SharedStorage<Format, kRows>& smem,
                                             RingPosition<kSlots<kRows>> ring, int buffer,
                                             uint32_t probabilities_parity,
                                             float (&o)[kCount][kRows / 2]) {
  using T = __nv_bfloat16;
  const int thread = reread_thread(), lane = thread % 32, warp = thread / 32 % kWarps;
#pragma unroll
  for (int i = 0; i < kTileSlots; ++i) {
    const auto position = ring.ahead(i);
    mbarrier_wait(smem_address(&smem.full[position.slot()]), position.parity());
  }
  const auto find_rows = [&](int half) {
    return smem_address(smem.ring[ring.ahead(2 * half + lane / 16).slot()]) +
           lane % 16 * Format::kRowBytes + kFirst * 64 + warp * 16;
  };
  uint32_t rows = find_rows(0);
  uint32_t raw[4], a[2][8];
  load_values(raw, rows);
  mbarrier_wait(smem_address(&smem.probabilities_full[buffer]), probabilities_parity);
  const uint32_t flags = *reinterpret_cast<const uint32_t*>(smem.flags[buffer]);
  if (flags & kRescaled) rescale_output<kRows, kCount>(o, smem.rescale[buffer]);
  const bool large_scales = flags & (kLargeScales * 0x01010101u);
#pragma unroll
  for (int m = 0; m < kCount; ++m) pin_registers(o[m]);
  const uint64_t probabilities = k_major_desc(smem_address(smem.probabilities[buffer]));
#pragma unroll
  for (int step = 0; step < 2 * kCount; ++step) {
    const int half = step / kCount, m = step % kCount, next = step + 1;
    const int group = (kFirst + m) / 2;
    const uint2 first = load_pair(smem_address(smem.scales[ring.ahead(2 * half).slot()][group]) + lane % 4 * 8);
    const uint2 second =
        load_pair(smem_address(smem.scales[ring.ahead(2 * half + 1).slot()][group]) + lane % 4 * 8);
    if (step >= 2) wgmma_wait<1>();
    uint32_t(&values)[8] = a[step % 2];
    convert_values(values, raw, {first.x, first.y, second.x, second.y});
    if (large_scales) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        multiply_excess<Format>(values + 4 * i, smem_address(smem.ring[ring.ahead(2 * half + i).slot()]),
                                group);
      }
    }
    if (m == kCount - 1) {
      __syncwarp();
      if (lane < 2) {
        mbarrier_arrive(smem_address(&smem.empty[ring.ahead(2 * half + lane).slot()]));
      }
      __syncwarp();
    }
    if (next == kCount) rows = find_rows(1);
    if (next < 2 * kCount) load_values(raw, rows + next % kCount * 64);
    wgmma_fence();
    wgmma_rs<T>(o[m], values, probabilities + 4 * half, 1);
    wgmma_rs<T>(o[m], values + 4, probabilities + 4 * half + 2, 1);
    wgmma_commit();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int m = 0; m < kCount; ++m) pin_registers(o[m]);
  if (lane == 0) mbarrier_arrive(smem_address(&smem.probabilities_empty[buffer]));
  __syncwarp();
}

template <typename T, typename Format, int kRows, int kFirst, int kCount, bool kGathers>
__device__ void run_values(const KernelArgs& args, SharedStorage<Format, kRows>& smem) {
  RingPosition<kSlots<kRows>> ring;
  BufferPosition buffer;
  uint32_t sums_parity = 0;
  if constexpr (kGathers) start_gather<Format, kRows>(args, smem);
  const auto fill = [&](int freed) {
    if constexpr (kGathers) fill_ring<Format, kRows>(args, smem, freed);
  };
  fill(0);

  for (int query = smem.begin.sequence; owns_work(smem.begin, smem.end, query); ++query) {
    const Piece piece = piece_of(smem.begin, smem.end, query, load_length(args.main, query));
    const bool empty = piece.tile_begin >= piece.tile_end;
    float o[kCount][kRows / 2] = {};
    int freed = 0;
    if (!empty) {
      ring.advance(kQueryItems<kRows> * kTileSlots);
      freed = kQueryItems<kRows> * kTileSlots;
    }
    for (int tiles = piece.tile_end - piece.tile_begin; tiles > 0; --tiles) {
      fill(freed);
      add_products<Format, kRows, kFirst, kCount>(smem, ring, buffer.slot(), buffer.parity(), o);
      freed = kTileSlots;
      ring.advance();
      ++buffer.turn;
    }
    fill(freed);
    const bool partial = piece.continued || piece.unfinished;
    const HeadTile heads = HeadTile::of_block<kRows>(args);
    if (!empty) {
      mbarrier_wait(smem_address(&smem.sums_full), sums_parity);
      sums_parity ^= 1;
    }
    if (partial) {
      store_partial<kFirst, kCount>(args, smem, o, heads, empty,
                                    piece_slot(blockIdx.y, piece.continued));
    } else {
      store_result<T, kFirst, kCount>(args, smem, o, heads, empty, query);
    }
    __syncwarp();
    if (!empty && threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&smem.sums_empty));
  }
}

}  // namespace flashmla::sm90::sparse
