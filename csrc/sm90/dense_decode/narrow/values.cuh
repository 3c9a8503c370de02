// A value warpgroup of the narrow kernel: O^T = V^T P^T for one half of the value columns, which
// are the rows, and the output. A warp has 16 of every 64 columns, for all query rows.
#pragma once

#include "sm90/attention/partial.cuh"
#include "sm90/attention/softmax.cuh"
#include "sm90/dense_decode/narrow/shared_storage.cuh"
#include "sm90/dense_decode/output.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::dense_decode::narrow {

template <int kRows>
using Output = float[kHalfChunks][kRows / 2];  // of each chunk of 64 columns

// Eight query rows of a chunk, times their factors, in 16 bit and turned back: a quad has a row,
// and a lane columns 2 (lane % 4) and the next of the warp's first and second eight.
template <typename V, int kRows>
__device__ __forceinline__ uint2 scale_and_turn(const float (&chunk)[kRows / 2], int n,
                                                float2 factor) {
  uint32_t v[2];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    v[m] = transpose_matrix(
        pack<V>(chunk[element(2 * n, m)] * factor.x, chunk[element(2 * n + 1, m)] * factor.y));
  }
  return {v[0], v[1]};
}

// The factors of this thread's two rows of the eight from row 8 n on.
__device__ __forceinline__ float2 load_factors(const float* of_rows, int n) {
  return *reinterpret_cast<const float2*>(of_rows + query_row(2 * n));
}

// Puts into shared memory the exponents of each row's largest values in this warp, not normalised.
template <int kRows>
__device__ __forceinline__ void find_exponents(SharedStorage<kRows>& smem, const Output<kRows>& o,
                                               int half) {
  constexpr int kThreadRows = thread_rows(kRows);
  float peak[kThreadRows] = {};
#pragma unroll
  for (int c = 0; c < kHalfChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      peak[i] = fmaxf(peak[i], fmaxf(fabsf(o[c][element(i, 0)]), fabsf(o[c][element(i, 1)])));
    }
  }
#pragma unroll
  for (int step = 4; step <= 16; step *= 2) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i)
      peak[i] = fmaxf(peak[i], __shfl_xor_sync(~0u, peak[i], step));
  }
  if (threadIdx.x % 32 < 4) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      smem.exponent[half][query_row(i)][threadIdx.x / 32 % kWarpgroupWarps] =
          __float_as_uint(peak[i]) >> 23;
    }
  }
}

// Turns the exponents into the row's store factor, and writes the inverse scale to the workspace
// (partial.cuh). Called by thread `row` of the warpgroup.
template <int kRows>
__device__ __forceinline__ void choose_factor(SharedStorage<kRows>& smem, int half, int row,
                                              bool empty, float* rows) {
  uint32_t bytes = *reinterpret_cast<const uint32_t*>(smem.exponent[half][row]);
  bytes = __vmaxu2(bytes & 0xff00ff, bytes >> 8 & 0xff00ff);
  const float below = __uint_as_float(max(bytes & 0xff, bytes >> 16) << 23);  // peak < 2 * below
  const float inverse = empty ? 0.0f : smem.inverse_sum[row];
  const int exponent = partial_exponent(below * inverse) + 1;
  smem.factor[half][row] = inverse * power_of_two(-exponent);
  if (row < smem.row_tile.count) {
    rows[row * kValueDim + partial_scale(kValueDim) + half] = power_of_two(exponent);
  }
}

// Writes a piece that is not the whole sequence to the workspace (partial.cuh).
template <int kRows>
__device__ __forceinline__ void store_partial(SharedStorage<kRows>& smem, const Output<kRows>& o,
                                              int half, bool empty, float* rows) {
  const int thread = threadIdx.x % kWarpgroupThreads, lane = thread % 32, warp = thread / 32;
  const int count = smem.row_tile.count;
  named_barrier_sync(kValueBarrier + half, kWarpgroupThreads);  // exponents are there
  if (thread < kRows) choose_factor(smem, half, thread, empty, rows);
  named_barrier_sync(kValueBarrier + half, kWarpgroupThreads);  // and factors
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 factor = load_factors(smem.factor[half], n);
    const int row = n * 8 + lane / 4;
    // Half of the 16 bytes that the quad's lane keeps of each 32 columns.
    auto* target = reinterpret_cast<uint2*>(rows + row * kValueDim) +
                   ((half * 8 + warp / 2) * 4 + lane % 4) * 2 + warp % 2;
#pragma unroll
    for (int c = 0; c < kHalfChunks; ++c) {
      const uint2 v = scale_and_turn<__half, kRows>(o[c], n, factor);
      if (row < count) target[c * 16] = v;
    }
  }
}

// Writes a whole sequence's result. Of the warp's sixteen columns even lanes take the first eight,
// odd ones the second: four each.
template <typename T, int kRows>
__device__ __forceinline__ void store_result(const SharedStorage<kRows>& smem,
                                             const Output<kRows>& o, int half, bool empty,
                                             T* rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarpgroupWarps;
  const int count = smem.row_tile.count;
  const bool odd = lane & 1;
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    const float2 factor = empty ? float2{} : load_factors(smem.inverse_sum, n);
    const int row = n * 8 + lane / 4;
    T* const target =
        rows + row * kValueDim + half * (kValueDim / 2) + warp * 16 + odd * 8 + lane % 4 / 2 * 4;
#pragma unroll
    for (int c = 0; c < kHalfChunks; ++c) {
      const uint2 v = scale_and_turn<T, kRows>(o[c], n, factor);
      const uint32_t other = __shfl_xor_sync(~0u, odd ? v.x : v.y, 1);
      if (row < count) {
        *reinterpret_cast<uint2*>(target + c * 64) = odd ? uint2{other, v.y} : uint2{v.x, other};
      }
    }
  }
}

template <typename T, int kRows>
__device__ __forceinline__ void add_products(const SharedStorage<kRows>& smem, Ring ring, int half,
                                             Output<kRows>& o) {
#pragma unroll
  for (int c = 0; c < kHalfChunks; ++c) pin_registers(o[c]);
  wgmma_fence();
  const uint64_t probabilities =
      unswizzled_desc(smem_address(smem.rope[ring.slot]), kRows * 16, 8 * 16);
  const uint64_t values =
      mn_major_desc(smem_address(smem.latent[ring.slot][half]), kGroupBytes, kTokenGroupBytes);
#pragma unroll
  for (int k = 0; k < kTileTokens / 16; ++k) {
#pragma unroll
    for (int c = 0; c < kHalfChunks; ++c) {
      wgmma_ss<T, /*kTransposedA=*/true>(o[c],
                                         values + kGroupBytes / 16 * c + kTokenGroupBytes / 8 * k,
                                         probabilities + kRows * 2 * k, 1);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int c = 0; c < kHalfChunks; ++c) pin_registers(o[c]);
}

template <typename T, int kRows>
__device__ void run_values(const KernelArgs& args, SharedStorage<kRows>& smem, Cut begin, Cut end,
                           int half) {
  constexpr int kThreadRows = thread_rows(kRows);
  const bool warp_leader = threadIdx.x % 32 == 0;
  Ring ring;
  uint32_t sums_parity = 0;

  for (int sequence = begin.sequence; owns_work(begin, end, sequence); ++sequence) {
    const int seqlen = args.clamp_seqlen(args.cache_seqlens[sequence]);
    const Piece piece = piece_of(begin, end, sequence, seqlen);
    // The queries are not for this warpgroup; it keeps step with the score warpgroup.
    mbarrier_wait(smem_address(&smem.probabilities_stored[ring.slot]), ring.parity);
    if (warp_leader) mbarrier_arrive(smem_address(&smem.load_done[ring.slot]));
    ring.advance();

    Output<kRows> o = {};
    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      const int slot = ring.slot;
      mbarrier_wait(smem_address(&smem.half_full[half][slot]), ring.parity);
      mbarrier_wait(smem_address(&smem.probabilities_stored[slot]), ring.parity);
      if (seqlen - tile * kTileTokens < kTileTokens) {
        zero_tail(smem.latent[slot][half], seqlen - tile * kTileTokens);
        fence_async_proxy();
        named_barrier_sync(kValueBarrier + half, kWarpgroupThreads);
      }
      if (tile > piece.tile_begin) {
        int power[kThreadRows], any = 0;
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) any |= power[i] = smem.rescale[slot][query_row(i)];
        if (__any_sync(~0u, any != 0)) {
#pragma unroll
          for (int i = 0; i < kThreadRows; ++i) {
            const float factor = rescale_factor(power[i]);
#pragma unroll
            for (int c = 0; c < kHalfChunks; ++c) {
              o[c][element(i, 0)] *= factor;
              o[c][element(i, 1)] *= factor;
            }
          }
        }
      }
      add_products<T>(smem, ring, half, o);
      if (warp_leader) mbarrier_arrive(smem_address(&smem.load_done[slot]));
      __syncwarp();
      ring.advance();
    }

    const bool empty = piece.tile_begin >= piece.tile_end;
    if (piece.partial()) find_exponents(smem, o, half);
    if (!empty) {
      mbarrier_wait(smem_address(&smem.sums_full), sums_parity);
      sums_parity ^= 1;
    }
    if (piece.partial()) {
      const int64_t row =
          int64_t{piece_slot(blockIdx.z, piece.continued)} * args.rows + smem.row_tile.first;
      store_partial<kRows>(smem, o, half, empty, args.out_accum + row * kValueDim);
    } else {
      const int64_t row = int64_t{sequence} * args.rows + smem.row_tile.first;
      store_result<T, kRows>(smem, o, half, empty, static_cast<T*>(args.out) + row * kValueDim);
    }
    __syncwarp();
    if (!empty && warp_leader) mbarrier_arrive(smem_address(&smem.sums_empty));
  }
}

}  // namespace flashmla::sm90::dense_decode::narrow
