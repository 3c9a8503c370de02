// A value warpgroup of the narrow kernel: O^T = V^T P^T for one half of the value columns, which
// are the rows, and the output. A warp has 16 of every 64 columns, for all query rows.
#pragma once

#include "../../common/barrier.cuh"
#include "../../common/matrix.cuh"
#include "../../common/smem_desc.cuh"
#include "../../common/wgmma.cuh"
#include "../../partial.cuh"
#include "../output.cuh"
#include "../softmax.cuh"
#include "shared_storage.cuh"

namespace flashmla::sm90::narrow {

template <int kRows>
using Output = float[kHalfChunks][kRows / 2];  // of each chunk of 64 columns

// The exponent of the largest of each row's normalised values, of all warps (partial.cuh), put into
// shared memory.
template <int kRows>
__device__ __forceinline__ void find_exponents(SharedStorage<kRows>& smem, const Output<kRows>& o,
                                               int half, bool empty) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps;
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    float peak = 0.0f;
#pragma unroll
    for (int c = 0; c < kHalfChunks; ++c) {
      peak = fmaxf(peak, fmaxf(fabsf(o[c][element(i, 0)]), fabsf(o[c][element(i, 1)])));
    }
#pragma unroll
    for (int step = 4; step <= 16; step *= 2) {
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, step));
    }
    const float normalised = empty ? 0.0f : peak * smem.inverse_sum[query_row(i)];
    if (lane < 4) smem.exponent[half][query_row(i)][warp] = __float_as_uint(normalised) >> 23;
  }
  named_barrier_sync(kValueBarrier + half, kWarpgroupThreads);
}

// partial_exponent of a row.
template <int kRows>
__device__ __forceinline__ int row_exponent(const SharedStorage<kRows>& smem, int half, int row) {
  uint32_t bytes = *reinterpret_cast<const uint32_t*>(smem.exponent[half][row]);
  bytes = __vmaxu2(bytes & 0xff00ff, bytes >> 8 & 0xff00ff);
  return partial_exponent(__uint_as_float(max(bytes & 0xff, bytes >> 16) << 23));
}

// Writes what a piece has accumulated.
template <typename T, int kRows>
__device__ __forceinline__ void store_piece(const KernelArgs& args, SharedStorage<kRows>& smem,
                                            const Output<kRows>& o, const Piece& piece,
                                            int sequence, int half, bool empty) {
  const int thread = reread_thread();
  const int lane = thread % 32, warp = thread / 32 % kWarps, quad_lane = lane % 4;
  const bool partial = piece.continued || piece.unfinished;
  const int index = partial ? piece_slot(blockIdx.z, piece.continued) : sequence;
  const int count = smem.row_tile.count, row_bytes = kValueDim * (partial ? 4 : 2);
  char* const rows = static_cast<char*>(partial ? args.out_accum : args.out) +
                     int64_t{row_bytes} * (int64_t{index} * args.rows + smem.row_tile.first);
  if (partial) find_exponents(smem, o, half, empty);
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n) {
    float factor[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = query_row(2 * n + j);
      factor[j] = empty ? 0.0f : smem.inverse_sum[row];
      if (!partial) continue;
      const int exponent = row_exponent(smem, half, row);
      factor[j] *= power_of_two(-exponent);
      if (warp == 0 && lane < 4 && row < count) {
        reinterpret_cast<float*>(rows + row * row_bytes)[kPartialScale + half] =
            power_of_two(exponent);
      }
    }
    // From here on a quad has a row, and a lane columns 2 quad_lane and the next of eight.
    const int row = n * 8 + lane / 4;
    char* const target = rows + row * row_bytes;
#pragma unroll
    for (int c = 0; c < kHalfChunks; ++c) {
      uint32_t v[2];  // of the warp's first and second eight columns
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float low = o[c][element(2 * n, m)] * factor[0];
        const float high = o[c][element(2 * n + 1, m)] * factor[1];
        v[m] = transpose_matrix(partial ? pack<__half>(low, high) : pack<T>(low, high));
      }
      if (partial) {
        // Half of the 16 bytes that the quad's lane keeps of 32 columns.
        const int unit = ((half * 8 + c * 2 + warp / 2) * 4 + quad_lane) * 2 + warp % 2;
        if (row < count) reinterpret_cast<uint2*>(target)[unit] = uint2{v[0], v[1]};
      } else {
        // Even lanes take the first eight columns, odd ones the second: four each.
        const bool odd = lane & 1;
        const uint32_t other = __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1);
        const int column =
            half * (kValueDim / 2) + c * 64 + warp * 16 + odd * 8 + quad_lane / 2 * 4;
        if (row < count) {
          *reinterpret_cast<uint2*>(target + 2 * column) =
              odd ? uint2{other, v[1]} : uint2{v[0], other};
        }
      }
    }
  }
  if (partial) named_barrier_sync(kValueBarrier + half, kWarpgroupThreads);  // exponents are read
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
  constexpr int kMine = kThreadRows<kRows>;
  const bool warp_leader = threadIdx.x % 32 == 0;
  Ring ring;
  uint32_t sums_parity = 0;

  for (int sequence = begin.sequence; owns_work(begin, end, sequence); ++sequence) {
    const int seqlen = load_seqlen(args, sequence);
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
      int power[kMine], any = 0;
#pragma unroll
      for (int i = 0; i < kMine; ++i) any |= power[i] = smem.rescale[slot][query_row(i)];
      if (tile > piece.tile_begin && __any_sync(~0u, any != 0)) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          const float factor = rescale_factor(power[i]);
#pragma unroll
          for (int c = 0; c < kHalfChunks; ++c) {
            o[c][element(i, 0)] *= factor;
            o[c][element(i, 1)] *= factor;
          }
        }
      }
      add_products<T>(smem, ring, half, o);
      if (warp_leader) mbarrier_arrive(smem_address(&smem.load_done[slot]));
      __syncwarp();
      ring.advance();
    }

    const bool empty = piece.tile_begin >= piece.tile_end;
    if (!empty) {
      mbarrier_wait(smem_address(&smem.sums_full), sums_parity);
      sums_parity ^= 1;
    }
    store_piece<T>(args, smem, o, piece, sequence, half, empty);
    __syncwarp();
    if (!empty && warp_leader) mbarrier_arrive(smem_address(&smem.sums_empty));
  }
}

}  // namespace flashmla::sm90::narrow
