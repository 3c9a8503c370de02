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
constexpr int kRowColumns = 64;              // in units of eight columns
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

// The merges to do. A part owns the merge of a sequence that starts in it and goes on in the next.
struct MergeList {
  int sequence[kMaxParts];  // that part p begins with
  // Bit p: part p goes on with the sequence that part p - 1 went on with; or began.
  uint32_t continues[kMaxParts / 32 + 1], starts[kMaxParts / 32];
  int warp_tasks[kWarps];   // of the parts of a warp's threads
  int task_end[kMaxParts];  // running number of block tasks, by the part after the owner
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

struct Merges {
  int rows;      // of all merges
  int tasks;     // of all merges
  int task_end;  // list.task_end of this thread's part
};

// Fills the list. Every thread calls, and looks after the part of its number.
__device__ __forceinline__ Merges list_merges(const DenseDecodeParams& params, MergeList& list) {
  const int part = threadIdx.x, lane = part % 32, warp = part / 32;
  const int rows = params.s_q * params.h_q;
  Cut before = {0, 0}, cut = {0, 0};
  if (part > 0 && part < params.num_parts) {
    before = load_cut(params, part - 1);
    cut = load_cut(params, part);
  }
  const bool midway = cut.tile > 0;
  const bool goes_on = midway && before.tile > 0 && before.sequence == cut.sequence;
  list.sequence[part] = cut.sequence;
  const uint32_t continues = __ballot_sync(~0u, goes_on),
                 starts = __ballot_sync(~0u, midway && !goes_on);
  if (lane == 0) {
    list.continues[warp] = continues;
    list.starts[warp] = starts;
    if (warp == 0) list.continues[kWarps] = 0;
  }
  __syncthreads();
  int merges = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) merges += __popc(list.starts[i]);
  Merges all = {merges * rows, 0, 0};
  if (merges == 0) return all;
  int tasks = 0;  // of the merge owned by the part before this thread's
  if (midway && !goes_on) {
    const Team team(2 + run_length(list.continues, part + 1), all.rows);
    const int items = rows << team.split;
    tasks = team.block ? items : (items + kWarps - 1) / kWarps;
  }
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const int other = __shfl_up_sync(~0u, tasks, i);
    if (lane >= i) tasks += other;
  }
  if (lane == 31) list.warp_tasks[warp] = tasks;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const int of_warp = list.warp_tasks[i];
    all.tasks += of_warp;
    if (i < warp) tasks += of_warp;
  }
  list.task_end[part] = all.task_end = tasks;
  return all;
}

// The workspace row of a piece's row `row`.
__device__ __forceinline__ uint32_t piece_row(const DenseDecodeParams& params, int owner, int piece,
                                              int row) {
  const int slot = piece_slot(owner + piece, /*continued=*/piece > 0);
  return static_cast<uint32_t>(slot * params.s_q * params.h_q + row);
}

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

// Log-sum-exp (base 2) of what the lanes hold; each lane gets it.
__device__ __forceinline__ float warp_lse(float lse) {
  const float peak = warp_max(lse);
  if (peak == -INFINITY) return -INFINITY;
  return peak + __log2f(warp_sum(exp2_approx(lse - peak)));
}

// Weight of a piece; 0 also where no piece saw a key.
__device__ __forceinline__ float weight(float piece_lse, float total_lse) {
  return total_lse == -INFINITY ? 0.0f : exp2_approx(piece_lse - total_lse);
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

// Columns number `i` of a row of the workspace, and what they are to be multiplied with.
__device__ __forceinline__ uint4 load_columns(const DenseDecodeParams& params, uint32_t row,
                                              int i) {
  return reinterpret_cast<const uint4*>(params.out_accum + uint64_t{row} * kValueDim)[i];
}

__device__ __forceinline__ float load_scale(const DenseDecodeParams& params, uint32_t row,
                                            int half) {
  return params.out_accum[uint64_t{row} * kValueDim + kPartialScale + half];
}

// What a lane knows of piece number `lane` of a row: its log-sum-exp and, for each of kHalves
// halves from `half` on, the scale of its columns; of the latter weigh() makes the piece's weights.
template <int kHalves>
struct LanePiece {
  float lse = -INFINITY, factor[kHalves] = {};

  __device__ __forceinline__ void load(const DenseDecodeParams& params, int owner, int pieces,
                                       int row, int half) {
    const int lane = threadIdx.x % 32;
    if (lane >= pieces) return;
    const uint32_t source = piece_row(params, owner, lane, row);
    lse = params.lse_accum[source];
#pragma unroll
    for (int i = 0; i < kHalves; ++i) factor[i] = load_scale(params, source, half + i);
  }

  // Returns the log-sum-exp of all pieces.
  __device__ __forceinline__ float weigh() {
    const float total_lse = warp_lse(lse);
#pragma unroll
    for (int i = 0; i < kHalves; ++i) factor[i] *= weight(lse, total_lse);
    return total_lse;
  }
};

// One warp merges a row of at most kFewPieces pieces.
template <typename T>
__device__ __forceinline__ void merge_row(const DenseDecodeParams& params, int owner, int pieces,
                                          int sequence, int row) {
  const int lane = threadIdx.x % 32;
  LanePiece<2> of_lane;
  of_lane.load(params, owner, pieces, row, 0);
  uint4 v[kFewPieces][2] = {};
#pragma unroll
  for (int i = 0; i < kFewPieces; ++i) {
    if (i >= pieces) break;
    const uint32_t source = piece_row(params, owner, i, row);
    v[i][0] = load_columns(params, source, lane);
    v[i][1] = load_columns(params, source, 32 + lane);
  }
  const float total_lse = of_lane.weigh();
  const int64_t target = int64_t{sequence} * params.s_q * params.h_q + row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Columns sum = {};
#pragma unroll
    for (int i = 0; i < kFewPieces; ++i) {  // the factor is 0 past the last piece
      sum.add_scaled(__shfl_sync(~0u, of_lane.factor[half], i), v[i][half]);
    }
    sum.template store<T>(params, target, half * 32 + lane);
  }
  if (lane == 0) params.lse[target] = total_lse * kLn2;
}

// One warp merges share number `share` of a row of at most 32 pieces. Its 32, 16 or 8 lanes' worth
// of columns leave the warp's other lanes to other pieces.
template <typename T>
__device__ __forceinline__ void merge_by_warp(const DenseDecodeParams& params, int owner,
                                              int pieces, int sequence, int row, int share,
                                              int split) {
  constexpr int kPiecesAtOnce = 8;
  const int shift = 6 - split, lanes = 1 << shift, turns = 32 >> shift;
  const int lane = threadIdx.x % 32;
  const int column = share * lanes + (lane & (lanes - 1)), half = share >> (split - 1);
  LanePiece<1> of_lane;
  of_lane.load(params, owner, pieces, row, half);
  float total_lse = -INFINITY;
  Columns sum = {};
  for (int first = 0; first < pieces; first += turns * kPiecesAtOnce) {
    uint4 v[kPiecesAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      const int piece = first + i * turns + (lane >> shift);
      if (piece >= pieces) break;
      v[i] = load_columns(params, piece_row(params, owner, piece, row), column);
    }
    __syncwarp();
    if (first == 0) total_lse = of_lane.weigh();
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      const int piece = first + i * turns + (lane >> shift);
      sum.add_scaled(__shfl_sync(~0u, of_lane.factor[0], piece % 32), v[i]);
    }
  }
  sum.add_teams(lanes);
  const int64_t target = int64_t{sequence} * params.s_q * params.h_q + row;
  if (lane < lanes) sum.template store<T>(params, target, column);
  if (share == 0 && lane == 0) params.lse[target] = total_lse * kLn2;
}

// One block does so, for any number of pieces.
template <typename T>
__device__ __forceinline__ void merge_by_block(const DenseDecodeParams& params, int owner,
                                               int pieces, int sequence, int row, int share,
                                               int split) {
  constexpr int kPiecesAtOnce = 4;
  const int shift = 6 - split, lanes = 1 << shift, turns = kThreads >> shift;
  __shared__ Columns partial[kWarps][32];
  const int thread = threadIdx.x, lane = thread % 32;
  const int column = share * lanes + (lane & (lanes - 1)), half = share >> (split - 1);
  float lse[kMaxParts / 32], peak = -INFINITY;  // of pieces lane, lane + 32, ...
#pragma unroll
  for (int i = 0; i < kMaxParts / 32; ++i) {
    lse[i] = -INFINITY;
    const int piece = i * 32 + lane;
    if (piece < pieces) lse[i] = params.lse_accum[piece_row(params, owner, piece, row)];
  }
  float total_lse = -INFINITY;
  Columns sum = {};
  for (int first = 0; first < pieces; first += turns * kPiecesAtOnce) {
    uint4 v[kPiecesAtOnce] = {};
    float piece_lse[kPiecesAtOnce], scale[kPiecesAtOnce];
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      const int piece = first + i * turns + (thread >> shift);
      piece_lse[i] = -INFINITY;
      scale[i] = 0.0f;
      if (piece >= pieces) continue;
      const uint32_t source = piece_row(params, owner, piece, row);
      piece_lse[i] = params.lse_accum[source];
      scale[i] = load_scale(params, source, half);
      v[i] = load_columns(params, source, column);
    }
    __syncwarp();
    if (first == 0) {
#pragma unroll
      for (int i = 0; i < kMaxParts / 32; ++i) peak = fmaxf(peak, lse[i]);
      peak = warp_max(peak);
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kMaxParts / 32; ++i) total += weight(lse[i], peak);
      total = warp_sum(total);
      if (peak > -INFINITY) total_lse = peak + __log2f(total);
    }
#pragma unroll
    for (int i = 0; i < kPiecesAtOnce; ++i) {
      sum.add_scaled(weight(piece_lse[i], total_lse) * scale[i], v[i]);
    }
  }
  sum.add_teams(lanes);
  if (lane < lanes) partial[thread / 32][lane] = sum;
  __syncthreads();
  if (thread >= lanes * 4) return;
  const int i = thread / 4, j = thread % 4;  // a pair of columns
  float low = 0.0f, high = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    low += partial[warp][i].v[2 * j];
    high += partial[warp][i].v[2 * j + 1];
  }
  const int64_t target = int64_t{sequence} * params.s_q * params.h_q + row;
  store_pair<T>(params, target, share * lanes + i, j, low, high);
  if (share == 0 && thread == 0) params.lse[target] = total_lse * kLn2;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    combine_kernel(DenseDecodeParams params) {
  __shared__ MergeList list;
  const int rows = params.s_q * params.h_q;
  const Merges all = list_merges(params, list);
  const int total = all.tasks;
  if (total == 0) launch_dependents();  // lets the next kernel in at once
  // One block must wait even so: this kernel may not end before what it depends on has.
  if (blockIdx.x >= max(total, 1)) return;
  if (total == 0) wait_for_prerequisites();
  for (int task = blockIdx.x; task < total; task += gridDim.x) {
    // The part whose range of tasks this one is in, one past the merge's owner.
    const int part = __syncthreads_count(all.task_end <= task);
    const int pieces = 2 + run_length(list.continues, part + 1);
    const int local = task - list.task_end[part - 1];
    const int sequence = list.sequence[part];
    const Team team(pieces, all.rows);
    const int item = team.block ? local : local * kWarps + threadIdx.x / 32;
    const int row = item >> team.split, share = item & ((1 << team.split) - 1);
    if (task == blockIdx.x) {
      wait_for_prerequisites();
      launch_dependents();
    }
    if (row >= rows) continue;
    if (team.split == 0)
      merge_row<T>(params, part - 1, pieces, sequence, row);
    else if (team.block)
      merge_by_block<T>(params, part - 1, pieces, sequence, row, share, team.split);
    else
      merge_by_warp<T>(params, part - 1, pieces, sequence, row, share, team.split);
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
