// The converting warpgroup: a tile's rows from global memory (they are in L2 by now) through
// registers to 16-bit rows in shared memory.
//
// Four rows at a time, the next four on their way: each lane loads sixteen columns, a piece, of two
// rows by turns, so that the eight lanes that store at once reach all banks.
#pragma once

#include "sm90/ptx/barrier.cuh"
#include "sm90/sparse_decode/wide/piece.cuh"
#include "sm90/sparse_decode/wide/shared_storage.cuh"

namespace flashmla::sm90::sparse::wide {

constexpr int kBatchRows = 4;
constexpr int kBatches = kTileTokens / kWarps / kBatchRows;  // of a warp in a tile

// First token of a warp's batch: half of its batches are in either half of the tile.
__device__ __forceinline__ int batch_token(int batch) {
  const int warp = threadIdx.x / 32 % kWarps;
  return batch / (kBatches / 2) * kHalfTokens + warp * (kHalfTokens / kWarps) +
         batch % (kBatches / 2) * kBatchRows;
}

// A lane's row of a batch, and piece of a row, in load `i`.
__device__ __forceinline__ int batch_row(int i) { return i / 2 * 2 + (threadIdx.x / 4 & 1); }
__device__ __forceinline__ int batch_piece(int i) {
  return i % 2 * 16 + threadIdx.x % 32 / 8 * 4 + threadIdx.x % 4;
}

// A batch's latent columns as they lie, of this lane.
template <typename Format>
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
      codes[i] = uint4{};
      scale[i] = 0;
      if constexpr (kInnerTail) more[i / 2] = i % 2 ? uint4{} : more[i / 2];
      if (row == nullptr) continue;
      if constexpr (Format::kCodes == Codes::kE2M1) {
        const uint2 half = load_8(row + piece * 8);
        codes[i] = {half.x, half.y, 0, 0};
      } else if (kInnerTail && i % 2 && piece >= kInnerTailPiece) {
        const uint8_t* tail = row + Format::kTailOffset + (piece - kInnerTailPiece) * 32;
        codes[i] = load_16(tail);
        more[i / 2] = load_16(tail + 16);
      } else {
        codes[i] = load_16(row + piece * 16);
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
#pragma unroll
    for (int i = 0; i < kBatchRows; ++i) {
      const int token = first + batch_row(i), piece = batch_piece(i);
      const float value = scale_value<Format::kScales>(scale[i]);
      uint32_t columns[8];
      if constexpr (Format::kCodes == Codes::kE2M1) {
        convert_nibbles<T>(columns, {codes[i].x, codes[i].y}, value);
      } else {
        convert_codes<T, Format::kScales>(columns, codes[i], value);
      }
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

// A batch's rope columns, of this lane: eight 16-bit ones, or with codes sixteen of half of the
// lanes.
template <typename Format>
struct RawRope {
  static constexpr bool kCoded = Format::kCodeColumns > kValueDim;
  uint4 bytes;

  template <typename AnyPlan>
  __device__ __forceinline__ void load(const AnyPlan& plan, int first) {
    const int lane = threadIdx.x % 32, unit = kCoded ? lane % 4 : lane % 8;
    const int row_of_batch = kCoded ? lane / 4 : lane / 8;
    bytes = uint4{};
    if (row_of_batch >= kBatchRows) return;
    const uint8_t* row = plan.row[first + row_of_batch];
    if (row != nullptr) {
      bytes = load_16(row + (kCoded ? kValueDim : Format::kTailOffset) + unit * 16);
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(uint32_t chunk, int first) const {
    const int lane = threadIdx.x % 32;
    if constexpr (kCoded) {
      if (lane / 4 >= kBatchRows) return;
      uint32_t columns[8];
      convert_codes<T, Scales::kNone>(columns, bytes, 1.0f);
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

// Converts the part's tile `tile`. raw: its first batch, if `loaded`; left as the next tile's, if
// that is of the same source and kAhead. Whether it was.
template <typename T, typename Format, bool kLoadAhead, typename Storage>
__device__ __forceinline__ bool convert_tile(Storage& smem, uint32_t tile, RawBatch<Format>& raw,
                                             bool loaded) {
  const auto& plan = smem.plan[tile % kPlans];
  const int buffer = buffer_of(tile);
  const uint32_t keys = smem_address(smem.keys[buffer][0]);
  const bool leader = threadIdx.x % 32 == 0;
  RawBatch<Format> odd;
  RawRope<Format> rope[2];
  static_assert(kBatches == 4);
  if (!loaded) raw.load(plan, batch_token(0));
  odd.load(plan, batch_token(1));
  mbarrier_wait(smem_address(&smem.keys_empty[buffer][0]), parity_of(tile) ^ 1);
  raw.template store<T>(keys, batch_token(0));
  raw.load(plan, batch_token(2));
  odd.template store<T>(keys, batch_token(1));
  odd.load(plan, batch_token(3));
  const auto load_rope = [&](int first_batch) {
    if constexpr (Storage::kRope) {
      for (int i = 0; i < 2; ++i) rope[i].load(plan, batch_token(first_batch + i));
    }
  };
  const auto store_rope = [&](int first_batch) {
    if constexpr (Storage::kRope) {
      for (int i = 0; i < 2; ++i) {
        rope[i].template store<T>(keys + kLatentChunks * kChunkBytes, batch_token(first_batch + i));
      }
    }
  };
  load_rope(0);
  mbarrier_wait(smem_address(&smem.keys_empty[buffer][1]), parity_of(tile) ^ 1);
  store_rope(0);  // now, as probabilities lay there
  load_rope(2);
  raw.template store<T>(keys, batch_token(2));
  bool ahead = false;
  if constexpr (kLoadAhead) {
    const uint32_t next = tile + 1;
    mbarrier_wait(smem_address(&smem.planned[next % kPlans]), next / kPlans & 1);
    ahead = smem.plan[next % kPlans].source != Source::kNone;
    if (ahead) raw.load(smem.plan[next % kPlans], batch_token(0));
  }
  odd.template store<T>(keys, batch_token(3));
  store_rope(2);
  fence_async_proxy();
  __syncwarp();
  if (leader) mbarrier_arrive(smem_address(&smem.keys_full[buffer]));
  return ahead;
}

// Copies 16 bytes from global to shared memory, asynchronously; zeros where source is null.
__device__ __forceinline__ void copy_16(uint32_t target, const uint8_t* source,
                                        const uint8_t* any) {
  const uint32_t bytes = source == nullptr ? 0 : 16;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target),
               "l"(source == nullptr ? any : source), "r"(bytes)
               : "memory");
}

// The same for rows that are 16-bit already. any: an address that may be read.
template <typename Storage>
__device__ __forceinline__ void copy_tile(Storage& smem, uint32_t tile, const uint8_t* any) {
  const auto& plan = smem.plan[tile % kPlans];
  const int buffer = buffer_of(tile), lane = threadIdx.x % 32;
  const uint32_t keys = smem_address(smem.keys[buffer][0]);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    mbarrier_wait(smem_address(&smem.keys_empty[buffer][half]), parity_of(tile) ^ 1);
#pragma unroll 1
    for (int batch = 0; batch < kBatches / 2; ++batch) {
      const int token = batch_token(half * (kBatches / 2) + batch) + lane / 8;
      const uint8_t* row = plan.row[token];
#pragma unroll
      for (int c = 0; c < kLatentChunks; ++c) {
        copy_16(keys + c * kChunkBytes + swizzled_offset(token, lane % 8),
                row == nullptr ? nullptr : row + c * kChunkRowBytes + lane % 8 * 16, any);
      }
    }
  }
  if constexpr (Storage::kRope) {
#pragma unroll
    for (int batch = 0; batch < kBatches; ++batch) {
      const int token = batch_token(batch) + lane / 8;
      const uint8_t* row = plan.row[token];
      copy_16(keys + kLatentChunks * kChunkBytes + swizzled_offset(token, lane % 8),
              row == nullptr ? nullptr : row + kLatentChunks * kChunkRowBytes + lane % 8 * 16, any);
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) mbarrier_arrive(smem_address(&smem.keys_full[buffer]));
}

template <typename T, typename Main, typename Extra>
__device__ void run_convert(const KernelArgs& args, SharedStorage<Main, Extra>& smem) {
  constexpr bool kSame = std::is_same_v<Main, Extra>;
  RawBatch<Main> raw;
  bool loaded = false;
  for (uint32_t tile = 0;; ++tile) {
    mbarrier_wait(smem_address(&smem.planned[tile % kPlans]), tile / kPlans & 1);
    const Source source = smem.plan[tile % kPlans].source;
    if (source == Source::kNone) return;
    if constexpr (Main::kCodes == Codes::kNone) {
      copy_tile(smem, tile, args.common.main.blocks);
    } else {
      if constexpr (!kSame) {
        if (source == Source::kExtra) {
          RawBatch<Extra> extra;
          convert_tile<T, Extra, false>(smem, tile, extra, false);
          continue;
        }
      }
      loaded = convert_tile<T, Main, kSame>(smem, tile, raw, loaded);
    }
  }
}

}  // namespace flashmla::sm90::sparse::wide
