// S^T = K Q^T, by the score warpgroup: scales and raw bytes of keys to fragments, and the products.
#pragma once

#include "sm90/formats/codes.cuh"
#include "sm90/formats/fragments.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/sparse_decode/narrow/formats.cuh"
#include "sm90/sparse_decode/narrow/shared_storage.cuh"

namespace flashmla::sm90::sparse::narrow {

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

}  // namespace flashmla::sm90::sparse::narrow
