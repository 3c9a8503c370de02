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
  // Uniform, which the compiler cannot know: wgmma's descriptors follow from it.
  const int half = __shfl_sync(~0u, thread / kWarpgroupThreads - 1, 0);
  Ring ring;
  LoadStream<kHeadDim> stream(args);
#pragma unroll 1
  for (int slot = 0; slot < kStages; ++slot) {
    stream.prepare(thread);
    stream.load(args, smem, slot, thread);
  }

  // The block's next query token that has tiles, from `query` on; zeros for those before it.
  const auto find_query = [&](int query) {
    for (; query < args.s_q && args.length_of(query) == 0; query += args.query_stride) {
      store_zeros<T>(args, query);
    }
    return query;
  };
  // Loads into a slot once all value warps are through with what it holds. Keeps lanes together:
  // without that, the next wgmma can wait for ever.
  const auto refill = [&](Ring ring) {
    const int thread = reread_thread();
    const uint32_t load_done = smem_address(&smem.load_done[ring.slot]);
    __syncwarp();
    if (thread % 32 == 0) mbarrier_arrive(load_done);
    stream.prepare(thread);
    const int slot = __shfl_sync(~0u, ring.slot, 0);  // uniform, which the compiler cannot know
    mbarrier_wait(load_done, ring.parity);
    stream.load(args, smem, slot, thread);
    __syncwarp();
  };

  for (int query = find_query(blockIdx.y); query < args.s_q;) {
    int tiles = num_tiles(args.length_of(query));
    ring.advance();  // past the heads
    // Zeros rather than products that overwrite: so no registers are kept for it between.
    float o[128];
#pragma unroll
    for (float& x : o) x = 0.0f;
    for (bool first = true; tiles > 0; --tiles, first = false) {
      const int row = output_row(0);
      mbarrier_wait(smem_address(&smem.probabilities_stored[ring.slot]), ring.parity);
      const int power0 = smem.rescale[ring.slot][row];
      const int power1 = smem.rescale[ring.slot][row + 8];
      if (__any_sync(~0u, (power0 | power1) != 0)) {
        const float factor0 = rescale_factor(power0), factor1 = rescale_factor(power1);
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] *= (i & 2) ? factor1 : factor0;
      }
      const int slot = __shfl_sync(~0u, ring.slot, 0);  // likewise
      const uint64_t probabilities = k_major_desc(smem_address(smem.rope[slot]));
      const uint64_t values =
          mn_major_desc(smem_address(smem.latent[slot][half]), kGroupBytes, kTokenGroupBytes);
      pin_registers(o);
      mbarrier_wait(smem_address(&smem.values_go[ring.slot]), ring.parity);
      // The score warpgroup has seen that the tile is there, and ordered its copies before wgmma.
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileTokens / 16; ++k) {
        wgmma_ss_mn<T>(o, probabilities + 2 * k, values + kTokenGroupBytes / 8 * k, 1);
      }
      wgmma_commit();
      if (first) {  // the heads have been taken out of their slot, and the last output is stored
        if (reread_thread() % 32 == 0) wait_for_stores_read();
        refill(ring.before());
      }
      wgmma_wait<0>();
      pin_registers(o);
      refill(ring);
      ring.advance();
    }
    const int next = find_query(query + args.query_stride);
    const int warp = reread_thread() / 32;
    const auto& out_factor = smem.out_factor[smem.odd_query[warp]];
    const int rows = count_heads(args) - warp % kWarpgroupWarps * 16;  // of the warp's
    if (next < args.s_q && rows >= 16) {
      // Through the slot of the next heads, once the score warpgroup has taken them.
      mbarrier_wait(smem_address(&smem.probabilities_stored[ring.slot]), ring.parity);
      store_through<T>(args, smem, ring.slot, o, query, out_factor);
    } else if (rows > 0) {
      store_output<T>(args, o, query, out_factor);
    }
    __syncwarp();
    if (reread_thread() % 32 == 0) smem.odd_query[reread_thread() / 32] ^= 1;
    __syncwarp();
    query = next;
  }
}

}  // namespace flashmla::sm90::sparse_prefill
