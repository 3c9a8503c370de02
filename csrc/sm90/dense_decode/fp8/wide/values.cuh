// A value warpgroup: O[64 x 256] = P V for one half of the value columns, and the output. Its warps
// bring and convert tiles too.
#pragma once

#include "sm90/attention/softmax.cuh"
#include "sm90/attention/store_rows.cuh"
#include "sm90/dense_decode/fp8/wide/load.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::dense_decode::fp8::wide {

// Writes what a piece has accumulated. All but o is read and derived anew: registers are short.
__device__ __forceinline__ void store_piece(const WideArgs& args, const WideStorage& smem,
                                            const float (&o)[128]) {
  using T = __nv_bfloat16;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int thread = reread_thread();
    const int half = thread / kWarpgroupThreads - 1;
    const int row = thread / 32 % 4 * 16 + thread % 32 / 4 + 8 * r;
    const bool valid = row < count_query_rows(args);
    if (!__any_sync(~0u, valid)) break;
    const int kept = *const_cast<const volatile int*>(&smem.kept[thread / 32 - kWarps]);
    const bool empty = kept < 0;
    const int sequence = empty ? ~kept : kept;
    const volatile Cut& begin = smem.begin;
    const volatile Cut& end = smem.end;
    const bool continued = sequence == begin.sequence && begin.tile > 0;
    const bool partial = continued || (sequence == end.sequence && end.tile > 0);
    const uint32_t index = partial ? piece_slot(blockIdx.y, continued) : sequence;
    const uint64_t offset = uint64_t{index * args.rows + first_query_row() + row} * kValueDim;
    if (empty) {
      void* target = partial ? static_cast<void*>(args.out_accum + offset)
                             : static_cast<T*>(args.out) + offset;
      store_zero_half_row(static_cast<uint4*>(target), partial, half, valid);
      continue;
    }
    const float inverse_sum = smem.inverse_sum[row];
    if (!partial) {
      store_half_row<T>(static_cast<T*>(args.out) + offset + half * (kValueDim / 2), o, r,
                        inverse_sum, valid);
    } else {
      store_partial_half_row(args.out_accum + offset, o, r, half, inverse_sum, valid);
    }
  }
}

// A ring's slot and parity in one register.
class PackedRing {
 public:
  __device__ __forceinline__ int slot() const { return bits_ & 3; }
  __device__ __forceinline__ uint32_t parity() const { return bits_ >> 2; }
  __device__ __forceinline__ int slot_before() const {
    return slot() == 0 ? kStages - 1 : slot() - 1;
  }
  __device__ __forceinline__ void advance() {
    bits_ = slot() == kStages - 1 ? bits_ & 4 ^ 4 : bits_ + 1;
    asm volatile("" : "+r"(bits_));
  }

 private:
  uint32_t bits_ = 0;
};

__device__ void run_values(const WideArgs& args, WideStorage& smem) {
  PackedRing ring;
  if (reread_thread() % 32 == 0) start_loads(args, smem);
  __syncwarp();
  const LastLoad first = LastLoad::of(smem);
  __syncwarp();
  if (reread_thread() % 32 == 0) load_next(args, smem, 2);
  __syncwarp();
  convert_tile(smem, 1, first);

  const auto convert = [&](PackedRing ring) {  // the last load
    convert_tile(smem, ring.slot_before(), LastLoad::of(smem));
  };
  // Loads into a slot once all value warps are through with what it holds. Keeps lanes together:
  // without that, the next wgmma can wait for ever.
  const auto refill = [&](PackedRing ring) {
    const uint32_t load_done = smem_address(&smem.load_done[ring.slot()]);
    __syncwarp();
    if (reread_thread() % 32 == 0) {
      mbarrier_arrive(load_done);
      mbarrier_wait(load_done, ring.parity());
      load_next(args, smem, ring.slot());
    }
    __syncwarp();
  };

  for (int sequence = smem.begin.sequence; owns_work(smem.begin, smem.end, sequence); ++sequence) {
    const int seqlen = args.clamp_seqlen(args.cache_seqlens[sequence]);
    const Piece piece = piece_of(smem.begin, smem.end, sequence, seqlen);
    int tiles = piece.tile_end - piece.tile_begin;
    // Zeros rather than products that overwrite: so no registers are kept for it between.
    float o[128];
#pragma unroll
    for (float& x : o) x = 0.0f;
    const bool empty = tiles <= 0;
    volatile int& kept = smem.kept[value_group()];
    __syncwarp();
    if (reread_thread() % 32 == 0) kept = empty ? ~sequence : sequence;
    __syncwarp();
    if (!empty) {
      convert(ring);
      mbarrier_wait(smem_address(&smem.probabilities_stored[ring.slot()]), ring.parity());
      refill(ring);
      ring.advance();
    }
    for (; tiles > 0; --tiles) {
      const int row = reread_thread() / 32 % 4 * 16 + reread_thread() % 32 / 4;
      mbarrier_wait(smem_address(&smem.probabilities_stored[ring.slot()]), ring.parity());
      const int power0 = smem.rescale[ring.slot()][row];
      const int power1 = smem.rescale[ring.slot()][row + 8];
      if (__any_sync(~0u, (power0 | power1) != 0)) {
        const float factor0 = rescale_factor(power0), factor1 = rescale_factor(power1);
#pragma unroll
        for (int i = 0; i < 128; ++i) o[i] *= (i & 2) ? factor1 : factor0;
      }
      const int half = reread_thread() / kWarpgroupThreads - 1;
      const uint64_t probabilities = k_major_desc(smem_address(smem.rope[ring.slot()]));
      const uint64_t values = mn_major_desc(smem_address(smem.latent[ring.slot()][half]),
                                            kGroupBytes, kTokenGroupBytes);
      pin_registers(o);
      mbarrier_wait(smem_address(&smem.values_go[ring.slot()]), ring.parity());
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileTokens / 16; ++k) {
        wgmma_ss_mn<Value>(o, probabilities + 2 * k, values + kTokenGroupBytes / 8 * k, 1);
      }
      wgmma_commit();
      convert(ring);
      wgmma_wait<0>();
      pin_registers(o);
      refill(ring);
      ring.advance();
    }
    store_piece(args, smem, o);
    sequence = kept < 0 ? ~kept : kept;
    __syncwarp();
  }
}

}  // namespace flashmla::sm90::dense_decode::fp8::wide
