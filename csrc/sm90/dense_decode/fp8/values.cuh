// The two value warpgroups: O^T += V^T P^T, whose rows are value columns and whose columns are
// query rows. Each has half of the value columns.
#pragma once

#include "sm90/attention/softmax.cuh"
#include "sm90/dense_decode/fp8/formats.cuh"
#include "sm90/dense_decode/fp8/load.cuh"
#include "sm90/dense_decode/fp8/output.cuh"
#include "sm90/formats/fragments.cuh"
#include "sm90/ptx/smem_desc.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla::sm90::dense_decode::fp8 {

__device__ __forceinline__ void load_factors(uint32_t (&factors)[4], uint32_t address) {
  const uint4 v = load_shared(address);
  factors[0] = v.x, factors[1] = v.y, factors[2] = v.z, factors[3] = v.w;
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

template <int kRows>
__device__ __forceinline__ void rescale_output(Output<kRows>& o, const uint8_t* rescale) {
  const int thread = reread_thread();
#pragma unroll
  for (int i = 0; i < kThreadRows<kRows>; ++i) {
    const float factor = rescale_factor(rescale[query_row(thread, i)]);
#pragma unroll
    for (int m = 0; m < kValueTiles; ++m) {
      o[m][element(i, 0)] *= factor;
      o[m][element(i, 1)] *= factor;
    }
  }
}

// Rows of the tile past the sequence may hold NaN, and 0 * NaN is NaN: the warpgroup's own columns
// of them become zeros, and their scales.
template <typename Format>
__device__ __forceinline__ void zero_tail(uint32_t tile, int valid_tokens) {
  constexpr int kUnits = kValueTiles * 64 / 16;
  const int thread = reread_thread();
  const uint32_t columns = tile + reread_side() * (kValueTiles * 64);
  for (int i = valid_tokens * kUnits + thread % kWarpgroupThreads; i < kTileTokens * kUnits;
       i += kWarpgroupThreads) {
    store_shared(columns + Format::offset(i / kUnits) + i % kUnits * 16, uint4{});
  }
  if constexpr (Format::kScales) {  // read where there are large ones (multiply_excess)
    const int token = valid_tokens + thread % kWarpgroupThreads;
    if (token < kTileTokens) {
      store_shared(tile + token * Format::kRowBytes + Format::kScaleOffset, uint4{});
    }
  }
  fence_async_proxy();  // before copies that come to lie there later
  named_barrier_sync(kValueBarrier + reread_side(), kWarpgroupThreads);
}

// Products of 16 tokens that are issued together: with 64 rows registers are few.
template <int kRows>
constexpr int kValueGroup = kRows == 64 ? 1 : 2;
template <int kRows>
constexpr int kValueBuffers = kRows == 64 ? 2 : 3;  // of such groups

// Raw bytes that a thread has at once, 32 tokens each.
template <typename Format, int kRows>
constexpr int kRaw = Format::kScales && kRows == 64 ? 1 : 2;

// Where the lane's token and the warp's first columns are.
template <typename Format, int kRows>
__device__ __forceinline__ uint32_t value_rows(SharedStorage<Format, kRows>& smem,
                                               Position<kRows> at) {
  const int thread = reread_thread();
  return smem_address(smem.ring[at.stage()]) + Format::offset_at(thread % 32) +
         thread / 32 % kRoleWarps * 64;
}

// Adds a tile's products, of which the first raw bytes are loaded. Frees the ring's stage as soon
// as all bytes are in registers.
template <typename Format, int kRows, bool kLargeScales>
__device__ __forceinline__ void add_products(SharedStorage<Format, kRows>& smem, Position<kRows> at,
                                             uint32_t rows, uint32_t (&raw)[kRaw<Format, kRows>][4],
                                             Output<kRows>& o) {
  using T = typename Format::Value;
  constexpr int kGroup = kValueGroup<kRows>, kBuffers = kValueBuffers<kRows>;
  const int thread = reread_thread(), lane = thread % 32, half = reread_side();
  const int slot = at.buffer();
  const uint32_t probabilities = operand_at(smem.probabilities[slot]);
  const int group = half * 2 + thread / 64 % 2;  // of the warp's columns
  const uint32_t scales =
      smem_address(smem.scales[slot][Format::kScales ? group : 0]) + lane % 4 * 16;
  constexpr int kSteps = 4 * kValueTiles / kGroup;
  uint32_t a[kBuffers][4 * kGroup];
  constexpr int kRaw = fp8::kRaw<Format, kRows>;
  uint32_t factors[4];  // of 32 tokens
#pragma unroll
  for (int m = 0; m < kValueTiles; ++m) pin_registers(o[m]);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    // Of 16 tokens each: 32 tokens of 16 columns, then of the next.
    const int fragment = step * kGroup, m = fragment / 2 % kValueTiles;
    uint32_t (&values)[4 * kGroup] = a[step % kBuffers];
    const int ahead = fragment / 2 + 1;  // the next 32 tokens, loaded once there is room for them
    if constexpr (Format::kScales) {
      if (fragment % (2 * kValueTiles) == 0) {
        load_factors(factors, scales + fragment / (2 * kValueTiles) * 64);
      }
    }
    const uint32_t rows_ahead =
        rows + ahead / kValueTiles * Format::offset_at(32) + ahead % kValueTiles * 16;
    const bool more = ahead < 2 * kValueTiles;
    if (kRaw == 2 && fragment % 2 == 0 && more) load_values(raw[ahead % kRaw], rows_ahead);
    if (step >= kBuffers - 1) wgmma_wait<kBuffers - 1>();
    const uint32_t after = step == 0 ? raw[0][0] : a[(step + kBuffers - 1) % kBuffers][0];
#pragma unroll
    for (int k = fragment; k < fragment + kGroup; ++k) {
      const int tokens = k / 2 / kValueTiles * 32 + k % 2 * 16;
      uint32_t* const value = values + 4 * (k - fragment);
      if constexpr (Format::kScales) {
        convert_values(value, raw[k / 2 % kRaw] + k % 2 * 2, factors + k % 2 * 2, after);
        if constexpr (kLargeScales) {
          const int again = reread_thread();
          multiply_excess<Format>(value, smem_address(smem.ring[at.stage()]) +
                                             (tokens + again % 4 * 2) * Format::kRowBytes +
                                             Format::kScaleOffset +
                                             (reread_side() * 2 + again / 64 % 2) * 4);
        }
      } else {
        convert_values(value, raw[k / 2 % kRaw] + k % 2 * 2, after);
      }
    }
    if (kRaw == 1 && more) {  // half by half, as this one's become free
      load_half_values(raw[0] + fragment % 2 * 2,
                       rows_ahead + fragment % 2 * Format::offset_at(16));
    }
    wgmma_fence();
#pragma unroll
    for (int k = fragment; k < fragment + kGroup; ++k) {
      wgmma_rs<T>(o[m], values + 4 * (k - fragment),
                  descriptor(probabilities + 4 * (k / 2 / kValueTiles) + 2 * (k % 2)), 1);
    }
    wgmma_commit();
    if (step + 1 == kSteps) {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(smem_address(&smem.empty[at.stage()]));
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int m = 0; m < kValueTiles; ++m) pin_registers(o[m]);
}

// A tile's share of the output. valid_tokens: of the tile.
template <typename Format, int kRows>
__device__ __forceinline__ void add_tile(SharedStorage<Format, kRows>& smem, Position<kRows> at,
                                         int valid_tokens, Output<kRows>& o) {
  const int slot = at.buffer();
  mbarrier_wait(smem_address(&smem.probabilities_full[slot]), at.buffer_parity());
  if (valid_tokens < kTileTokens)
    zero_tail<Format>(smem_address(smem.ring[at.stage()]), valid_tokens);
  const uint32_t rows = value_rows(smem, at);
  uint32_t raw[kRaw<Format, kRows>][4];
  load_values(raw[0], rows);
  const uint32_t flags = *reinterpret_cast<const uint32_t*>(smem.flags[slot]);
  if (flags & (kRescaled * 0x01010101u)) rescale_output<kRows>(o, smem.rescale[slot]);
  if (flags & (kHasLargeScales * 0x01010101u)) {
    if constexpr (Format::kScales) {
      add_products<Format, kRows, true>(smem, at, rows, raw, o);
    }
  } else {
    add_products<Format, kRows, false>(smem, at, rows, raw, o);
  }
  if (reread_thread() % 32 == 0) {
    mbarrier_arrive(smem_address(&smem.probabilities_empty[slot]));
  }
  __syncwarp();
}

template <typename T, typename Format, int kRows>
__device__ void run_values(const KernelArgs& args, SharedStorage<Format, kRows>& smem) {
  Position<kRows> at;
  if (is_first_loader()) start_loads(args, smem);

  for (int sequence = smem.begin.sequence; owns_work(smem.begin, smem.end, sequence); ++sequence) {
    const int seqlen = args.clamp_seqlen(args.cache_seqlens[opaque(sequence)]);
    const Piece piece = piece_of(smem.begin, smem.end, sequence, seqlen);
    int tiles = piece.tile_end - piece.tile_begin;
    Output<kRows> o = {};
    // Not in registers while products are under way: the sequence, ~ if the piece is empty, and the
    // tokens of the last tile.
    const auto kept = [&]()->volatile int2& {
      return smem.kept[reread_thread() / 32 - kRoleWarps];
    };
    __syncwarp();
    if (reread_thread() % 32 == 0) {
      kept().x = tiles > 0 ? sequence : ~sequence;
      kept().y = seqlen - (piece.tile_end - 1) * kTileTokens;
    }
    __syncwarp();
    for (; tiles > 0; --tiles) {
      add_tile(smem, at, tiles > 1 ? int{kTileTokens} : kept().y, o);
      load_again(args, smem, at);
      at.next_tile();
    }
    sequence = kept().x;
    const bool empty = sequence < 0;
    if (empty) sequence = ~sequence;
    if (!empty) {
      mbarrier_wait(smem_address(&smem.sums_full), at.sums_parity());
      at.next_piece();
    }
    const Piece part = piece_of_tiles(smem.begin, smem.end, sequence, 0);
    const int64_t row =
        int64_t{result_index(part, blockIdx.y, sequence)} * args.rows + smem.row_tile.first;
    if (part.partial()) {
      store_partial(smem, o, empty, args.out_accum + row * kValueDim);
    } else {
      store_result(smem, o, empty, static_cast<T*>(args.out) + row * kValueDim);
    }
    __syncwarp();
    if (!empty && threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&smem.sums_empty));
  }
}

}  // namespace flashmla::sm90::dense_decode::fp8
