// Merges the pieces of the sequences that the schedule cut: out = sum of w_i out_i with
// w_i = 2^(lse_i - lse), in a fixed order.
#include "combine.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../split_schedule.h"
#include "common/barrier.cuh"
#include "common/launch.h"
#include "common/matrix.cuh"
#include "partial.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kValueDim = 512;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kBlocksPerMultiprocessor = 3;  // what fits
constexpr int kMostShares = 8;               // of a row
constexpr int kFewPieces = 4;                // whose rows a lane can load at once
static_assert(kThreads == kMaxParts, "a thread looks after one part");

// Who merges what: a warp or a block a row, or a half, a quarter or an eighth of one. The more
// pieces, the fewer columns and the more warps, so that a lane has one round of loads to wait for;
// but all blocks should be at work at once, unless a warp could not hold the pieces' weights.
struct Team {
  bool block;
  int split;  // a row into 2^split shares: 0 (by a warp only), 1, 2 or 3

  // rows: of all merges.
  __device__ __forceinline__ Team(int pieces, int rows) {
    const int blocks = gridDim.x;
    block = pieces > 32 || (pieces > kFewPieces && rows * (pieces > 16 ? 2 : 8) <= blocks);
    const int teams = blocks * (block ? 1 : kWarps);
    const bool many = pieces > (block ? 64 : 16);  // more than one round of quarters
    split = pieces <= kFewPieces ? 0 : many && 8 * rows <= teams ? 3 : 4 * rows <= teams ? 2 : 1;
  }
};

// What is left to do of a sequence that was cut: it begins in part `owner` and goes on in the next.
struct alignas(16) Merge {
  int owner, pieces, sequence;
  int first_task;  // in the running number of all blocks' tasks
};

struct SharedList {
  uint32_t continues[kMaxParts / 32 + 1];  // bit p: part p goes on with part p - 1's continued piece
  int warp_tasks[kWarps];                  // of the parts of a warp's threads
  Merge current[2];                        // in turns
};

// How many bits from `first` on are set without a gap.
__device__ __forceinline__ int run_length(const uint32_t* bits, int first) {
  int length = 0;
  for (int word = first / 32, shift = first % 32;; ++word, shift = 0) {
    const uint32_t clear = ~bits[word] >> shift << shift;
    if (clear != 0) return length + __ffs(clear) - 1 - shift;
    length += 32 - shift;
  }
}

// Cut `index`; its tile is 0 if that is not within a sequence.
__device__ __forceinline__ Cut load_cut(const DenseDecodeParams& params, int index) {
  const int2 cut = reinterpret_cast<const int2*>(params.cuts)[index];
  return {cut.x, cut.x >= 0 && cut.x < params.b ? max(cut.y, 0) : 0};
}

// The merges to do, as a thread knows them.
struct Merges {
  int rows, tasks;  // of all merges
  Merge mine;       // into whose second piece this thread's part begins
  int mine_end;     // end of its tasks; its first one if there is no such merge
};

// Every thread calls, and looks after the part of its number.
__device__ __forceinline__ Merges list_merges(const DenseDecodeParams& params, SharedList& list) {
  const int part = threadIdx.x, lane = part % 32, warp = part / 32;
  const int rows = params.s_q * params.h_q;
  Cut before = {0, 0}, cut = {0, 0};
  if (part > 0 && part < params.num_parts) {
    before = load_cut(params, part - 1);
    cut = load_cut(params, part);
  }
  const bool midway = cut.tile > 0;
  const bool goes_on = midway && before.tile > 0 && before.sequence == cut.sequence;
  const bool starts = midway && !goes_on;
  const uint32_t continues = __ballot_sync(~0u, goes_on);
  if (lane == 0) {
    list.continues[warp] = continues;
    if (warp == 0) list.continues[kWarps] = 0;
  }
  Merges all = {__syncthreads_count(starts) * rows, 0, {part - 1, 0, cut.sequence, 0}, 0};
  if (all.rows == 0) return all;
  int tasks = 0;
  if (starts) {
    all.mine.pieces = 2 + run_length(list.continues, part + 1);
    const Team team(all.mine.pieces, all.rows);
    const int items = rows << team.split;
    tasks = team.block ? items : (items + kWarps - 1) / kWarps;
  }
  int end = tasks;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(~0u, end, i);
    if (lane >= i) end += other;
  }
  if (lane == 31) list.warp_tasks[warp] = end;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const int of_warp = list.warp_tasks[i];
    all.tasks += of_warp;
    if (i < warp) end += of_warp;
  }
  all.mine_end = end;
  all.mine.first_task = end - tasks;
  return all;
}

// Waits for the kernel whose results are merged, once. What can be known before, the addresses of
// the first loads above all, should be: each instruction after it, executed once, costs its fetch.
struct Prerequisites {
  bool awaited = false;

  __device__ __forceinline__ void await() {
    if (awaited) return;
    wait_for_prerequisites();
    launch_dependents();
    awaited = true;
  }
};

// Keeps the compiler from computing an address where it is used, past the wait.
template <typename V>
__device__ __forceinline__ void compute_here(V*& address) {
  asm volatile("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
}

// A row to merge: where its pieces are in the workspace. Piece 0 is the owner's, the others are the
// next parts'.
struct RowPieces {
  const float *columns, *lse;  // of the owner's first slot
  int count;
  uint32_t slot_rows;  // rows of a slot

  __device__ __forceinline__ RowPieces(const DenseDecodeParams& params, int owner, int pieces,
                                       int row)
      : count(pieces), slot_rows(params.s_q * params.h_q) {
    const int64_t first = int64_t{piece_slot(owner, /*continued=*/true)} * slot_rows + row;
    columns = params.out_accum + first * kValueDim;
    lse = params.lse_accum + first;
  }

  // Rows from the owner's first slot to a piece's.
  __device__ __forceinline__ uint32_t offset(int piece) const {
    return piece_slot(piece, /*continued=*/piece > 0) * slot_rows;
  }

  __device__ __forceinline__ const float* row(int piece) const {
    return columns + uint64_t{offset(piece)} * kValueDim;
  }
};

// 16 bytes, number `column` of a row, of every `turns`-th piece from `piece` on.
struct PieceLoads {
  const float* next;
  int64_t first_step, step;  // floats; the owner's piece is not in its part's first slot
  int left, turns;

  __device__ __forceinline__ PieceLoads(const RowPieces& pieces, int piece, int turns, int column)
      : next(pieces.row(piece) + column * 4),
        step(int64_t{pieces.offset(turns)} * kValueDim),
        left(pieces.count - piece),
        turns(turns) {
    first_step = step - (piece == 0 ? int64_t{pieces.slot_rows} * kValueDim : 0);
    compute_here(next);
  }

  // The next ones; zeros past the last piece.
  template <int kCount>
  __device__ __forceinline__ void load(uint4 (&v)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      v[i] = uint4{};
      if (left > 0) v[i] = *reinterpret_cast<const uint4*>(next);
      left -= turns;
      next += first_step;
      first_step = step;
    }
  }
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
  return x;
}

// A piece's share of the row's sum, relative to the largest one's; 0 where no piece saw a key.
__device__ __forceinline__ float relative_weight(float lse, float peak) {
  return peak == -INFINITY ? 0.0f : exp2_approx(lse - peak);
}

__device__ __forceinline__ float inverse_of_weights(float total) {
  return total > 0.0f ? __fdividef(1.0f, total) : 0.0f;
}

// Natural log-sum-exp of the row.
__device__ __forceinline__ float merged_lse(float peak, float total) {
  return total > 0.0f ? (peak + __log2f(total)) * kLn2 : -INFINITY;
}

// Stores two neighbouring columns: pair `j` of Columns number `i` of a row of the result.
template <typename T>
__device__ __forceinline__ void store_pair(const DenseDecodeParams& params, int64_t row, int i,
                                           int j, float low, float high) {
  auto* pairs = static_cast<uint32_t*>(params.out) + row * (kValueDim / 2);
  pairs[i / 4 * 16 + j * 4 + i % 4] = pack<T>(low, high);
}

// Eight columns: one of the 64 pieces of 16 bytes of a row of the workspace (partial.cuh).
struct Columns {
  float v[8];

  __device__ __forceinline__ void add_scaled(float w, uint4 piece) {
    const uint32_t packed[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&packed[j]));
      v[2 * j] += w * pair.x;
      v[2 * j + 1] += w * pair.y;
    }
  }

  // Adds what the warp's teams of `lanes` lanes have.
  __device__ __forceinline__ void add_teams(int lanes) {
#pragma unroll 1
    for (; lanes < 32; lanes *= 2) {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] += __shfl_xor_sync(~0u, v[j], lanes);
    }
  }

  template <typename T>
  __device__ __forceinline__ void store(const DenseDecodeParams& params, int64_t row, int i) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) store_pair<T>(params, row, i, j, v[2 * j], v[2 * j + 1]);
  }
};

// One warp merges a row of kMost pieces, or one less.
template <typename T, int kMost>
__device__ __forceinline__ void merge_row(const DenseDecodeParams& params, const RowPieces& pieces,
                                          int64_t target, Prerequisites& prerequisites) {
  const int lane = threadIdx.x % 32;
  const float *rows[kMost], *lses[kMost];
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    rows[i] = pieces.row(i);
    lses[i] = pieces.lse + pieces.offset(i);
    compute_here(rows[i]);
    compute_here(lses[i]);
  }
  prerequisites.await();
  float lse[kMost], peak = -INFINITY, total = 0.0f;
  float2 scale[kMost] = {};  // of the left and the right half
  uint4 v[kMost][2] = {};
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const bool there = i < kMost - 1 || kMost == 2 || i < pieces.count;
    const auto* columns = reinterpret_cast<const uint4*>(rows[i]) + lane;
    lse[i] = there ? *lses[i] : -INFINITY;
    if (there) {
      scale[i] = *reinterpret_cast<const float2*>(rows[i] + kPartialScale);
      v[i][0] = columns[0];
      v[i][1] = columns[32];
    }
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) peak = fmaxf(peak, lse[i]);
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const float w = relative_weight(lse[i], peak);
    total += w;
    scale[i].x *= w;
    scale[i].y *= w;
  }
  const float inverse = inverse_of_weights(total);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Columns sum = {};
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      sum.add_scaled((half == 0 ? scale[i].x : scale[i].y) * inverse, v[i][half]);
    }
    sum.template store<T>(params, target, half * 32 + lane);
  }
  if (lane == 0) params.lse[target] = merged_lse(peak, total);
}

// One warp merges share number `share` of a row of at most 32 pieces. Its 32, 16 or 8 lanes' worth
// of columns leave the warp's other lanes to other pieces. Lane i weighs piece i.
template <typename T>
__device__ __forceinline__ void merge_by_warp(const DenseDecodeParams& params,
                                              const RowPieces& pieces, int64_t target, int share,
                                              int split, Prerequisites& prerequisites) {
  const int shift = 6 - split, lanes = 1 << shift, turns = 32 >> shift;
  const int lane = threadIdx.x % 32;
  const int column = share * lanes + (lane & (lanes - 1)), half = share >> (split - 1);
  const float* weighed = pieces.row(lane) + kPartialScale + half;
  const float* weighed_lse = pieces.lse + pieces.offset(lane);
  compute_here(weighed);
  compute_here(weighed_lse);
  PieceLoads loads(pieces, lane >> shift, turns, column);
  prerequisites.await();
  float lse = -INFINITY, factor = 0.0f;
  if (lane < pieces.count) {
    lse = *weighed_lse;
    factor = *weighed;
  }
  uint4 v[8];
  loads.load(v);
  const float peak = warp_max(lse), w = relative_weight(lse, peak), total = warp_sum(w);
  factor *= w * inverse_of_weights(total);
  Columns sum = {};
  for (int piece = lane >> shift;;) {
#pragma unroll
    for (int i = 0; i < 8; ++i, piece += turns) {
      sum.add_scaled(__shfl_sync(~0u, factor, piece % 32), v[i]);
    }
    if (piece - (lane >> shift) >= pieces.count) break;
    loads.load(v);
  }
  sum.add_teams(lanes);
  if (lane < lanes) sum.template store<T>(params, target, column);
  if (share == 0 && lane == 0) params.lse[target] = merged_lse(peak, total);
}

// One block does so, for any number of pieces. Thread i weighs piece i.
template <typename T>
__device__ __forceinline__ void merge_by_block(const DenseDecodeParams& params,
                                               const RowPieces& pieces, int64_t target, int share,
                                               int split, Prerequisites& prerequisites) {
  __shared__ Columns partial[kWarps][32];
  __shared__ float weights[kMaxParts], peaks[kWarps], totals[kWarps];
  const int shift = 6 - split, lanes = 1 << shift, turns = kThreads >> shift;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int column = share * lanes + (lane & (lanes - 1)), half = share >> (split - 1);
  const float* weighed = pieces.row(thread) + kPartialScale + half;
  const float* weighed_lse = pieces.lse + pieces.offset(thread);
  compute_here(weighed);
  compute_here(weighed_lse);
  PieceLoads loads(pieces, thread >> shift, turns, column);
  prerequisites.await();
  float lse = -INFINITY, scale = 0.0f;
  if (thread < pieces.count) {
    lse = *weighed_lse;
    scale = *weighed;
  }
  uint4 v[4];
  loads.load(v);
  float peak = warp_max(lse);
  if (lane == 0) peaks[warp] = peak;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) peak = fmaxf(peak, peaks[i]);
  const float w = relative_weight(lse, peak), of_warp = warp_sum(w);
  weights[thread] = w * scale;
  if (lane == 0) totals[warp] = of_warp;
  __syncthreads();
  Columns sum = {};
  for (int piece = thread >> shift;;) {
#pragma unroll
    for (int i = 0; i < 4; ++i, piece += turns) {
      sum.add_scaled(weights[piece % kMaxParts], v[i]);
    }
    if (piece - (thread >> shift) >= pieces.count) break;
    loads.load(v);
  }
  sum.add_teams(lanes);
  if (lane < lanes) partial[warp][lane] = sum;
  __syncthreads();
  if (thread >= lanes * 4) return;
  const int i = thread / 4, j = thread % 4;  // a pair of columns
  float low = 0.0f, high = 0.0f, total = 0.0f;
#pragma unroll
  for (int of = 0; of < kWarps; ++of) {
    low += partial[of][i].v[2 * j];
    high += partial[of][i].v[2 * j + 1];
    total += totals[of];
  }
  const float inverse = inverse_of_weights(total);
  store_pair<T>(params, target, share * lanes + i, j, low * inverse, high * inverse);
  if (share == 0 && thread == 0) params.lse[target] = merged_lse(peak, total);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    combine_kernel(DenseDecodeParams params) {
  __shared__ SharedList list;
  const int rows = params.s_q * params.h_q;
  const Merges all = list_merges(params, list);
  if (all.tasks == 0) launch_dependents();  // lets the next kernel in at once
  // One block must wait even so: this kernel may not end before what it depends on has.
  if (blockIdx.x >= max(all.tasks, 1)) return;
  if (all.tasks == 0) wait_for_prerequisites();
  Prerequisites prerequisites;
  int turn = 0;
  for (int task = blockIdx.x; task < all.tasks; task += gridDim.x, turn ^= 1) {
    if (all.mine.first_task <= task && task < all.mine_end) list.current[turn] = all.mine;
    __syncthreads();
    const Merge merge = list.current[turn];
    const Team team(merge.pieces, all.rows);
    const int local = task - merge.first_task;
    const int item = team.block ? local : local * kWarps + threadIdx.x / 32;
    const int row = item >> team.split, share = item & ((1 << team.split) - 1);
    if (row >= rows) continue;
    const RowPieces pieces(params, merge.owner, merge.pieces, row);
    const int64_t target = int64_t{merge.sequence} * rows + row;
    if (merge.pieces == 2)
      merge_row<T, 2>(params, pieces, target, prerequisites);
    else if (merge.pieces <= kFewPieces)
      merge_row<T, kFewPieces>(params, pieces, target, prerequisites);
    else if (team.block)
      merge_by_block<T>(params, pieces, target, share, team.split, prerequisites);
    else
      merge_by_warp<T>(params, pieces, target, share, team.split, prerequisites);
  }
}

}  // namespace

Status run_combine(const DenseDecodeParams& params, cudaStream_t stream) {
  if (params.num_parts < 2) return Status::Ok();  // nothing can be cut
  if (params.num_parts > kMaxParts) {
    return Status::InvalidArgument("dense_decode takes schedules of at most " +
                                   std::to_string(kMaxParts) + " parts, got " +
                                   std::to_string(params.num_parts));
  }
  const int rows = params.s_q * params.h_q;
  int multiprocessors = 0;
  if (Status s = count_multiprocessors(&multiprocessors); !s.ok()) return s;
  const unsigned grid = std::min((params.num_parts - 1) * rows * kMostShares,
                                 multiprocessors * kBlocksPerMultiprocessor);
  LaunchOptions options{grid, kThreads};
  options.dependent = true;
  if (params.dtype == DType::kBFloat16) {
    return launch(combine_kernel<__nv_bfloat16>, options, stream, "dense_decode combine", params);
  }
  return launch(combine_kernel<__half>, options, stream, "dense_decode combine", params);
}

}  // namespace flashmla::sm90
