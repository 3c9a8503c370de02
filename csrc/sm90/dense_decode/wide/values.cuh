// A value warpgroup: O[64 x 256] = P V for one half of the value columns, and the output. One
// thread of the right warpgroup issues all loads.
#pragma once

#include "sm90/attention/softmax.cuh"
#include "sm90/attention/store_rows.cuh"
#include "sm90/dense_decode/output.cuh"
#include "sm90/dense_decode/wide/load.cuh"
#include "sm90/ptx/barrier.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::dense_decode::wide {

// Writes what a piece has accumulated. All but o is read and derived anew: registers are short
// here.
template <typename T>
__device__ __forceinline__ void store_piece(const KernelArgs& args, const SharedStorage& smem,
                                            const float (&o)[128], int sequence, bool empty,
                                            bool odd_piece) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int thread = reread_thread();
    const int half = thread / kWarpgroupThreads - 1;
    const int row = thread / 32 % 4 * 16 + thread % 32 / 4 + 8 * r;
    const volatile RowTile& tile = smem.row_tile;
    const bool valid = row < tile.count;
    if (!__any_sync(~0u, valid)) break;
    const volatile Cut& begin = smem.begin;
    const volatile Cut& end = smem.end;
    const bool continued = sequence == begin.sequence && begin.tile > 0;
    const bool unfinished = sequence == end.sequence && end.tile > 0;
    const bool partial = continued || unfinished;
    if (empty) {
      const int index = partial ? piece_slot(blockIdx.z, continued) : sequence;
      const uint64_t offset = output_offset(args, index, tile.first + row, 0);
      void* target = partial ? static_cast<void*>(args.out_accum + offset)
                             : static_cast<T*>(args.out) + offset;
      store_zero_half_row(static_cast<uint4*>(target), partial, half, valid);
      continue;
    }
    const float inverse_sum = smem.inverse_sum[odd_piece][row];
    if (!partial) {
      store_half_row<T>(static_cast<T*>(args.out) +
                            output_offset(args, sequence, tile.first + row, half * (kValueDim / 2)),
                        o, r, inverse_sum, valid);
    } else {
      store_partial_half_row(args.out_accum + output_offset(args, piece_slot(blockIdx.z, continued),
                                                            tile.first + row, 0),
                             o, r, half, inverse_sum, valid);
    }
  }
}

template <typename T, int kBoxes>
__device__ void run_values(const KernelArgs& args, SharedStorage& smem, int half) {
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int barrier = kValueBarrier + half;  // named barrier of this warpgroup
  const int first_row = thread / 32 * 16 + thread % 32 / 4;
  const bool loads = threadIdx.x == kLoadingThread;
  float o[128];
  Ring ring;
  bool odd_piece = false;  // counting pieces that are not empty
  if (loads) fill_slot<kBoxes>(args, smem, kStages - 1);
  // Keeps lanes from running ahead of the loading thread, here and below: without this, the next
  // wgmma can wait for ever.
  __syncwarp();

  for (int sequence = smem.begin.sequence; owns_work(smem.begin, smem.end, sequence); ++sequence) {
    const int seqlen = args.clamp_seqlen(args.cache_seqlens[sequence]);
    const Piece piece = piece_of(smem.begin, smem.end, sequence, seqlen);
    bool fresh = true;  // nothing accumulated yet
    // The queries are not for this warpgroup. But it must not run ahead of the score warpgroup, as
    // it would where many sequences are empty: barriers tell neighbouring phases apart, no more.
    mbarrier_wait(smem_address(&smem.half_full[half][ring.slot]), ring.parity);
    if (thread % 32 == 0) mbarrier_arrive(smem_address(&smem.load_done[ring.slot]));
    if (loads) {
      find_item<kBoxes>(args, smem);
      refill<kBoxes>(args, smem, ring);
    }
    __syncwarp();
    ring.advance();

    for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
      mbarrier_wait(smem_address(&smem.half_full[half][ring.slot]), ring.parity);
      if (seqlen - tile * kTileTokens < kTileTokens) {
        // All scores of this tile must have been read from it first.
        mbarrier_wait(smem_address(&smem.scores_done[ring.slot]), ring.parity);
        zero_tail(smem.latent[ring.slot][half], seqlen - tile * kTileTokens);
        fence_async_proxy();
        named_barrier_sync(barrier, kWarpgroupThreads);
      }
      mbarrier_wait(smem_address(&smem.probabilities_stored[ring.slot]), ring.parity);
      const int power0 = smem.rescale[ring.slot][first_row];
      const int power1 = smem.rescale[ring.slot][first_row + 8];
      if (!fresh && __any_sync(~0u, (power0 | power1) != 0)) {
        const float factor0 = rescale_factor(power0), factor1 = rescale_factor(power1);
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] *= (i & 2) ? factor1 : factor0;
      }

      const uint64_t probabilities = k_major_desc(smem_address(smem.rope[ring.slot]));
      const uint64_t values =
          mn_major_desc(smem_address(smem.latent[ring.slot][half]), kGroupBytes, kTokenGroupBytes);
      pin_registers(o);
      mbarrier_wait(smem_address(&smem.values_go[ring.slot]), ring.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileTokens / 16; ++k) {
        wgmma_ss_mn<T>(o, probabilities + 2 * k, values + kTokenGroupBytes / 8 * k,
                       k > 0 || !fresh);
      }
      wgmma_commit();
      if (loads) find_item<kBoxes>(args, smem);
      wgmma_wait<0>();
      pin_registers(o);
      __syncwarp();
      if (thread % 32 == 0) mbarrier_arrive(smem_address(&smem.load_done[ring.slot]));
      if (loads) refill<kBoxes>(args, smem, ring);
      __syncwarp();
      fresh = false;
      ring.advance();
    }
    store_piece<T>(args, smem, o, sequence, fresh, odd_piece);
    odd_piece ^= !fresh;
  }
}

}  // namespace flashmla::sm90::dense_decode::wide
