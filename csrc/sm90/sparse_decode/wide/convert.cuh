// The converting warpgroup: a tile's rows from global memory (they are in L2 by now) through
// registers to 16-bit rows in shared memory.
//
// A batch of four rows at a time, or of two where registers are short, the next one on its way:
// each lane loads sixteen columns, a piece, of two rows by turns, so that the eight lanes that
// store at once reach all banks.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/sparse_decode/wide/piece.cuh"
#include "sm90/sparse_decode/wide/shared_storage.cuh"

namespace flashmla::sm90::sparse::wide {

constexpr int kWarpRows = kTileTokens / kWarps;  // of a tile, that a warp converts
constexpr int kRopeRows = 4;                     // that it loads at once

// The token that is number `row` of a warp's: half of them are in either half of the tile.
__device__ __forceinline__ int warp_token(int row) {
  const int warp = threadIdx.x / 32 % kWarps;
  return row / (kWarpRows / 2) * kHalfTokens + warp * (kWarpRows / 2) + row % (kWarpRows / 2);
}

// A lane's row of a batch, and piece of a row, in load `i`.
__device__ __forceinline__ int batch_row(int i) { return i / 2 * 2 + (threadIdx.x / 4 & 1); }
__device__ __forceinline__ int batch_piece(int i) {
  return i % 2 * 16 + threadIdx.x % 32 / 8 * 4 + threadIdx.x % 4;
}

// A batch's latent columns as they lie, of this lane.
template <typename Format, int kBatchRows>
struct RawBatch {
  // v4 has its rope where the last four pieces of the latent columns would be.
  static constexpr bool kInnerTail = Format::kCodeColumns < kValueDim;
  static constexpr int kInnerTailPiece = Format::kCodeColumns / kPieceColumns;
  uint4 codes[kBatchRows];
  uint4 more[kInnerTail ? kBatchRows / 2 : 1];  // of a tail piece the upper eight columns
  uint32_t scale[kBatchRows];

  template <typename AnyPlan>
  __device__ __forceinline__ void load(const AnyPlan& plan, int first) {
#pragma unroll
    for (int i = 0; i < kBatchRows; ++i) {
      const int token = first + batch_row(i), piece = batch_piece(i);
      const uint8_t* row = plan.row[token];
      if constexpr (Format::kCodes == Codes::kE2M1) {
        const uint2 half = load_8(row + piece * 8);
        codes[i] = {half.x, half.y, 0, 0};
      } else {
        const bool tail = kInnerTail && i % 2 && piece >= kInnerTailPiece;
        const int bytes = tail ? Format::kTailOffset + (piece - kInnerTailPiece) * 32 : piece * 16;
        codes[i] = load_16(row + bytes);
        if (kInnerTail && i % 2) more[i / 2] = load_16(row + (tail ? bytes + 16 : bytes));
      }
      const uint8_t* scales = row;
      if constexpr (Format::kTwoPlanes) scales = plan.scales[token];
      scales += Format::kScaleOffset;
      const int group = piece * kPieceColumns / Format::kGroup;
      if constexpr (Format::kScales == Scales::kFloat32) {
        scale[i] = load_4(scales + group * 4);
      } else if constexpr (Format::kScales != Scales::kNone) {
        scale[i] = load_1(scales + group);  // a tail piece's is the pad byte
      }
    }
  }

  // keys: the buffer's first chunk.
  template <typename T>
  __device__ __forceinline__ void store(uint32_t keys, int first) const {
    constexpr bool kMayBeSpecial =
        Format::kCodes == Codes::kE4M3 && std::is_same_v<T, __nv_bfloat16>;
    bool special = false;
    if constexpr (kMayBeSpecial) {
#pragma unroll
      for (int i = 0; i < kBatchRows; ++i) {
        special |= is_special(codes[i], scale_value<Format::kScales>(scale[i]));
      }
      special = __any_sync(~0u, special);
    }
    if (special) [[unlikely]]
      store_columns<T, kMayBeSpecial>(keys, first);
    else
      store_columns<T, false>(keys, first);
  }

 private:
  template <typename T, bool kMend>
  __device__ __forceinline__ void store_columns(uint32_t keys, int first) const {
#pragma unroll
    for (int i = 0; i < kBatchRows; ++i) {
      const int token = first + batch_row(i), piece = batch_piece(i);
      const float value = scale_value<Format::kScales>(scale[i]);
      const uint32_t factor = scale_factor<T, Format::kCodes>(value);
      uint32_t columns[8];
      if constexpr (Format::kCodes == Codes::kE2M1) {
        convert_nibbles<T>(columns, {codes[i].x, codes[i].y}, factor);
      } else {
        convert_codes<T>(columns, codes[i], factor);
      }
      if constexpr (kMend) mend_codes(columns, codes[i], value);
      uint4 lower = {columns[0], columns[1], columns[2], columns[3]};
      uint4 upper = {columns[4], columns[5], columns[6], columns[7]};
      if (kInnerTail && i % 2 && piece >= kInnerTailPiece) {
        lower = from_bf16<T>(codes[i]);
        upper = from_bf16<T>(more[i / 2]);
      }
      const uint32_t chunk = keys + piece / 4 * kChunkBytes;
      store_shared(chunk + swizzled_offset(token, piece % 4 * 2), lower);
      store_shared(chunk + swizzled_offset(token, piece % 4 * 2 + 1), upper);
    }
  }
};

// Four rows' rope columns, of this lane: eight 16-bit ones, or with codes sixteen of half of the
// lanes.
template <typename Format>
struct RawRope {
  static constexpr bool kCoded = Format::kCodeColumns > kValueDim;
  uint4 bytes;

  template <typename AnyPlan>
  __device__ __forceinline__ void load(const AnyPlan& plan, int first) {
    const int lane = threadIdx.x % 32, unit = kCoded ? lane % 4 : lane % 8;
    const int row_of_batch = kCoded ? lane / 4 : lane / 8;
    if (row_of_batch >= kRopeRows) return;
    const uint8_t* row = plan.row[first + row_of_batch];
    bytes = load_16(row + (kCoded ? kValueDim : Format::kTailOffset) + unit * 16);
  }

  template <typename T>
  __device__ __forceinline__ void store(uint32_t chunk, int first) const {
    const int lane = threadIdx.x % 32;
    if constexpr (kCoded) {
      if (lane / 4 >= kRopeRows) return;
      uint32_t columns[8];
      convert_codes<T>(columns, bytes, scale_factor<T, Codes::kE4M3>(1.0f));
      if (std::is_same_v<T, __nv_bfloat16> && is_special(bytes, 1.0f)) {
        mend_codes(columns, bytes, 1.0f);
      }
      const int token = first + lane / 4, unit = lane % 4 * 2;
      store_shared(chunk + swizzled_offset(token, unit),
                   {columns[0], columns[1], columns[2], columns[3]});
      store_shared(chunk + swizzled_offset(token, unit + 1),
                   {columns[4], columns[5], columns[6], columns[7]});
    } else {
      store_shared(chunk + swizzled_offset(first + lane / 8, lane % 8), from_bf16<T>(bytes));
    }
  }
};

// Rows of a batch: v4 has its rope beside, and two formats take turns where they differ.
template <typename Main, typename Extra>
constexpr int kRowsAtOnce = Main::kCodeColumns >= kValueDim && std::is_same_v<Main, Extra> ? 4 : 2;

// Converts the part's tile `tile`. even: its first batch, if `loaded`; left as the next tile's, if
// there is one and kLoadAhead. Whether it was.
template <typename T, typename Format, bool kLoadAhead, typename Storage, int kBatchRows>
__device__ __forceinline__ bool convert_tile(Storage& smem, uint32_t tile,
                                             RawBatch<Format, kBatchRows>& even, bool loaded) {
  static_assert(kWarpRows % (4 * kBatchRows) == 0 || kWarpRows == 4 * kBatchRows);
  const auto& plan = smem.plan[tile % kPlans];
  const int buffer = buffer_of(tile);
  const uint32_t keys = smem_address(smem.keys[buffer][0]);
  const uint32_t rope_chunk = keys + kLatentChunks * kChunkBytes;
  RawBatch<Format, kBatchRows> odd;
  RawRope<Format> rope[2];
  const auto load_rope = [&](int row) {
    if constexpr (Storage::kRope) {
      for (int i = 0; i < 2; ++i) rope[i].load(plan, warp_token(row + i * kRopeRows));
    }
  };
  const auto store_rope = [&](int row) {
    if constexpr (Storage::kRope) {
      for (int i = 0; i < 2; ++i) {
        rope[i].template store<T>(rope_chunk, warp_token(row + i * kRopeRows));
      }
    }
  };
  bool ahead = false;
  if (!loaded) even.load(plan, warp_token(0));
#pragma unroll 1
  for (int row = 0; row < kWarpRows; row += 2 * kBatchRows) {
    const bool last = row == kWarpRows - 2 * kBatchRows;
    const int half = row / (kWarpRows / 2);
    odd.load(plan, warp_token(row + kBatchRows));
    mbarrier_wait(smem_address(&smem.keys_empty[buffer][half]), parity_of(tile) ^ 1);
    if (last) load_rope(0);  // into where probabilities lay
    even.template store<T>(keys, warp_token(row));
    if (!last) {
      even.load(plan, warp_token(row + 2 * kBatchRows));
    } else {
      store_rope(0);
      load_rope(kWarpRows / 2);
      if constexpr (kLoadAhead) {
        const uint32_t next = tile + 1;
        mbarrier_wait(smem_address(&smem.planned[next % kPlans]), next / kPlans & 1);
        ahead = smem.plan[next % kPlans].source != Source::kNone;
        if (ahead) even.load(smem.plan[next % kPlans], warp_token(0));
      }
    }
    odd.template store<T>(keys, warp_token(row + kBatchRows));
    if (last) store_rope(kWarpRows / 2);
  }
  fence_async_proxy();
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_address(&smem.keys_full[buffer]));
  return ahead;
}

// Copies 16 bytes from global to shared memory, asynchronously.
__device__ __forceinline__ void copy_16(uint32_t target, const uint8_t* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// The same for rows that are 16-bit already.
template <typename Storage>
__device__ __forceinline__ void copy_tile(Storage& smem, uint32_t tile) {
  const auto& plan = smem.plan[tile % kPlans];
  const int buffer = buffer_of(tile), lane = threadIdx.x % 32;
  const uint32_t keys = smem_address(smem.keys[buffer][0]);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    mbarrier_wait(smem_address(&smem.keys_empty[buffer][half]), parity_of(tile) ^ 1);
#pragma unroll 1
    for (int row = 0; row < kWarpRows / 2; row += kRopeRows) {
      const int token = warp_token(half * (kWarpRows / 2) + row) + lane / 8;
      const uint8_t* source = plan.row[token];
#pragma unroll
      for (int c = 0; c < kLatentChunks; ++c) {
        copy_16(keys + c * kChunkBytes + swizzled_offset(token, lane % 8),
                source + c * kChunkRowBytes + lane % 8 * 16);
      }
    }
  }
  if constexpr (Storage::kRope) {
#pragma unroll
    for (int i = 0; i < kWarpRows; i += kRopeRows) {
      const int token = warp_token(i) + lane / 8;
      const uint8_t* source = plan.row[token];
      copy_16(keys + kLatentChunks * kChunkBytes + swizzled_offset(token, lane % 8),
              source + kLatentChunks * kChunkRowBytes + lane % 8 * 16);
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) mbarrier_arrive(smem_address(&smem.keys_full[buffer]));
}

template <typename T, typename Main, typename Extra>
__device__ void run_convert(SharedStorage<Main, Extra>& smem) {
  constexpr bool kSame = std::is_same_v<Main, Extra>;
  RawBatch<Main, kRowsAtOnce<Main, Extra>> raw;
  bool loaded = false;
  for (uint32_t tile = 0;; ++tile) {
    mbarrier_wait(smem_address(&smem.planned[tile % kPlans]), tile / kPlans & 1);
    const Source source = smem.plan[tile % kPlans].source;
    if (source == Source::kNone) return;
    if constexpr (Main::kCodes == Codes::kNone) {
      copy_tile(smem, tile);
    } else {
      if constexpr (!kSame) {
        if (source == Source::kExtra) {
          RawBatch<Extra, kRowsAtOnce<Main, Extra>> extra;
          convert_tile<T, Extra, false>(smem, tile, extra, false);
          continue;
        }
      }
      loaded = convert_tile<T, Main, kSame>(smem, tile, raw, loaded);
    }
  }
}

}  // namespace flashmla::sm90::sparse::wide
