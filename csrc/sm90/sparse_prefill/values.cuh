// A value warpgroup: O[64 x 256] = P V for one half of the value columns, and
// the output. Its warps load the ring too, while the score products run.
#pragma once

#include "sm90/attention/softmax.cuh"
#include "sm90/ptx/wgmma.cuh"
#include "sm90/sparse_prefill/gather.cuh"
#include "sm90/sparse_prefill/output.cuh"

namespace flashmla::sm90::sparse_prefill {

template <typename T, int kHeadDim>
__device__ void run_values(const KernelArgs& args, SharedStorage& smem) {
  const int thread = reread_thread();
  const bool leader = thread % 32 == 0;
  const int first_row = thread % kWarpgroupThreads / 32 * 16 + thread % 32 / 4;
  const int half = thread / kWarpgroupThreads - 1;
  Ring ring;
  bool odd = false;  // counting query tokens that are not empty
  LoadStream<kHeadDim> stream(args, thread);
#pragma unroll 1
  for (int slot = 0; slot < kStages; ++slot) {
    stream.prepare();
    stream.load(args, smem, slot);
  }

  for (int query = blockIdx.y; query < args.s_q; query += args.query_stride) {
    int tiles = num_tiles(args.length_of(query));
    if (tiles == 0) {
      store_zeros<T>(args, query);
      continue;
    }
    stream.prepare();
    // The score warpgroup has taken the heads out of their slot.
    mbarrier_wait(smem_address(&smem.probabilities_stored[ring.slot]), ring.parity);
    if (leader) mbarrier_arrive(smem_address(&smem.load_done[ring.slot]));
    stream.load(args, smem, ring.slot);
    __syncwarp();
    ring.advance();
    // Zeros rather than products that overwrite: so no registers are kept for it between.
    float o[128];
#pragma unroll
    for (float& x : o) x = 0.0f;
    for (; tiles > 0; --tiles) {
      mbarrier_wait(smem_address(&smem.probabilities_stored[ring.slot]), ring.parity);
      const int power0 = smem.rescale[ring.slot][first_row];
      const int power1 = smem.rescale[ring.slot][first_row + 8];
      if (__any_sync(~0u, (power0 | power1) != 0)) {
        const float factor0 = rescale_factor(power0), factor1 = rescale_factor(power1);
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] *= (i & 2) ? factor1 : factor0;
      }
      const uint64_t probabilities = k_major_desc(smem_address(smem.rope[ring.slot]));
      const uint64_t values =
          mn_major_desc(smem_address(smem.latent[ring.slot][half]), kGroupBytes, kTokenGroupBytes);
      pin_registers(o);
      mbarrier_wait(smem_address(&smem.values_go[ring.slot]), ring.parity);
      // The score warpgroup has seen that the tile is there, and ordered its
      // copies before wgmma.
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileTokens / 16; ++k) {
        wgmma_n256_ss_mn<T>(o, probabilities + 2 * k, values + kTokenGroupBytes / 8 * k, 1);
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin_registers(o);
      stream.prepare();
      __syncwarp();
      const uint32_t load_done = smem_address(&smem.load_done[ring.slot]);
      if (leader) mbarrier_arrive(load_done);
      mbarrier_wait(load_done, ring.parity);
      stream.load(args, smem, ring.slot);
      // Keeps lanes together: without this, the next wgmma can wait for ever.
      __syncwarp();
      ring.advance();
    }
    store_output<T>(args, o, query, smem.out_factor[odd]);
    odd ^= true;
  }
}

}  // namespace flashmla::sm90::sparse_prefill
