// A value warpgroup: O[64 x 256] = P V for one half of the value columns, and the output. One thread of
// the right warpgroup issues all loads.
#pragma once

#include "../common/barrier.cuh"
#include "../common/matrix.cuh"
#include "../common/smem_desc.cuh"
#include "../common/wgmma.cuh"
#include "load.cuh"

namespace flashmla::sm90 {

// Rows of the tile past the sequence may hold NaN, and 0 * NaN is NaN.
__device__ __forceinline__ void zero_tail(uint8_t* half, int valid_tokens) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  for (int i = valid_tokens * 8 + thread; i < kTileTokens * 8; i += kWarpgroupThreads) {
#pragma unroll
    for (int c = 0; c < kHalfChunks; ++c) {
      store_shared(smem_address(half + c * kChunkBytes) + i * 16, uint4{0, 0, 0, 0});
    }
  }
}

// Transposes a 4x4 of registers between the four lanes of a quad: lane i's v[j] becomes lane j's v[i].
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? v[j] : v[j + 1], 1);
    if (odd) v[j] = other;
    else v[j + 1] = other;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t other = __shfl_xor_sync(~0u, upper ? v[j] : v[j + 2], 2);
    if (upper) v[j] = other;
    else v[j + 2] = other;
  }
}

// Writes the normalised half: 16-bit to `out` or, for a partial piece, f32 to `out_accum`.
template <typename T>
__device__ __forceinline__ void store_output(const KernelArgs& args, const SharedStorage& smem, const float (&o)[128], int half,
                                             const float (&inverse_sum)[2], bool partial,
                                             int destination) {
  const int thread = threadIdx.x % kWarpgroupThreads, quad = thread % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int offset = smem.row_offset[thread / 32 * 16 + thread % 32 / 4 + 8 * r];
    const int64_t index =
        (int64_t{destination} * args.s_q * args.h_q + offset) * kValueDim + half * (kValueDim / 2);
    if (partial) {
      if (offset < 0) continue;
      float2* target = reinterpret_cast<float2*>(args.out_accum + index) + quad;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        target[i * 4] =
            float2{o[4 * i + 2 * r] * inverse_sum[r], o[4 * i + 2 * r + 1] * inverse_sum[r]};
      }
    } else {
      uint4* target = reinterpret_cast<uint4*>(static_cast<T*>(args.out) + index) + quad;
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        uint32_t v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] = pack<T>(o[4 * (i + j) + 2 * r] * inverse_sum[r],
                         o[4 * (i + j) + 2 * r + 1] * inverse_sum[r]);
        }
        transpose_quad(v);
        if (offset >= 0) target[i] = uint4{v[0], v[1], v[2], v[3]};
      }
    }
  }
}

template <typename T>
__device__ void run_values(const KernelArgs& args, SharedStorage& smem, Cut begin, Cut end, int half) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int barrier = 2 + half;  // named barrier of this warpgroup
  const int first_row = thread / 32 * 16 + thread % 32 / 4;
  const bool loads = half == 1 && thread == 32;
  if (loads) start_loads(args, smem, begin, end);
  float o[128];
  float inverse_sum[2];
  RingIndex<kStages> stage;
  RingIndex<2> pair;

  for (int sequence = begin.sequence; owns_work(begin, end, sequence); ++sequence) {
    const int seqlen = load_seqlen(args, sequence);
    const Piece piece = piece_of(begin, end, sequence, seqlen);
    const bool partial = piece.continued || piece.unfinished;
    const int destination = partial ? piece_slot(blockIdx.z, piece.continued) : sequence;
    if (piece.tile_begin >= piece.tile_end) {
#pragma unroll
      for (int i = 0; i < 128; ++i) o[i] = 0.0f;
      inverse_sum[0] = inverse_sum[1] = 0.0f;
    }

    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      mbarrier_wait(smem_address(&smem.latent_full[half][stage.slot]), stage.parity);
      mbarrier_wait(smem_address(&smem.probabilities_stored[pair.slot]), pair.parity);
      const float rescale0 = smem.rescale[pair.slot][first_row];
      const float rescale1 = smem.rescale[pair.slot][first_row + 8];
      if (tile > piece.tile_begin && __any_sync(~0u, rescale0 != 1.0f || rescale1 != 1.0f)) {
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] *= (i & 2) ? rescale1 : rescale0;
      }
      if (seqlen - tile * kTileTokens < kTileTokens) {
        zero_tail(smem.latent[stage.slot][half], seqlen - tile * kTileTokens);
        fence_async_proxy();
        named_barrier_sync(barrier, kWarpgroupThreads);
      }

      const uint64_t probabilities = k_major_desc(smem_address(smem.rope[pair.slot]));
      const uint64_t values = mn_major_desc(smem_address(smem.latent[stage.slot][half]), kChunkBytes);
      pin_registers(o);
      mbarrier_wait(smem_address(&smem.values_go[pair.slot]), pair.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileTokens / 16; ++k) {
        wgmma_n256_ss_mn<T>(o, probabilities + 2 * k, values + 128 * k,
                            k > 0 || tile > piece.tile_begin);
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin_registers(o);
      inverse_sum[0] = smem.inverse_sum[pair.slot][first_row];
      inverse_sum[1] = smem.inverse_sum[pair.slot][first_row + 8];

      __syncwarp();
      const uint32_t done = smem_address(&smem.values_done[pair.slot]);
      if (thread % 32 == 0) mbarrier_arrive(done);
      if (loads) {
        mbarrier_wait(done, pair.parity);
        load_more(args, smem, stage.slot, pair.slot);
      }
      stage.advance();
      pair.advance();
    }
    store_output<T>(args, smem, o, half, inverse_sum, partial, destination);
  }
}

}  // namespace flashmla::sm90
