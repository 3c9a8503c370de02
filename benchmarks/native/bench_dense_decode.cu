// Times the Hopper kernels without JAX, in a CUDA graph captured by hand, and checks them against a
// naive kernel first. Shapes come from a file that shapes.py writes; see README.md beside this.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "compare.h"
#include "graph_time.cuh"
#include "naive_attend.cuh"
#include "noise.cuh"
#include "sm90/dense_decode/launch.h"
#include "sm90/make_schedule/launch.h"

using T = __nv_bfloat16;
constexpr int kDqk = 576, kDv = 512, kBlock = 64;

// One thread block a query row; scores in global memory.
__global__ void naive(flashmla::DenseDecodeParams p, double* scores, int max_tokens, float* out,
                      float* lse) {
  const int row = blockIdx.x, rows = p.s_q * p.h_q, sequence = row / rows;
  const int head = row % p.h_q, query = row % rows / p.h_q, kv = head / (p.h_q / p.h_kv);
  const int length = p.seen != nullptr
                         ? p.seen[sequence * p.s_q + query]
                         : p.cache_seqlens[sequence] - (p.causal ? p.s_q - 1 - query : 0);
  const T* q = static_cast<const T*>(p.q) + int64_t(row) * kDqk;
  const auto key = [&](int t) {
    const int64_t block = p.block_table[int64_t(sequence) * p.max_blocks + t / kBlock];
    return static_cast<const T*>(p.blocks) + ((block * kBlock + t % kBlock) * p.h_kv + kv) * kDqk;
  };
  const auto score = [&](int t) {
    const T* k = key(t);
    double dot = 0;
    for (int d = 0; d < kDqk; ++d) dot += double(__bfloat162float(q[d])) * __bfloat162float(k[d]);
    return dot * p.sm_scale;
  };
  const auto value = [&](int t, int d) { return __bfloat162float(key(t)[d]); };
  naive_attend(length, kDv, scores + int64_t(row) * max_tokens, score, value, nullptr,
               out + int64_t(row) * kDv, lse + row);
}

struct Shape {
  int s_q, h_q, h_kv, num_parts;
  double best_us, limit_us;  // best_us 0: no peer is recorded
  std::string label;
  std::vector<int> lengths;
  int tile_rows = 64;  // of the schedule, as num_parts
};

struct Bench : DeviceArrays {
  T* pool;
  int64_t pool_blocks;
  float query_scale = 10;    // scores then have standard deviation 1
  bool call_graphs = false;  // each call a child graph, as XLA makes them

  struct Problem {
    flashmla::DenseDecodeParams params{};
    flashmla::MakeScheduleParams schedule{};
    std::vector<const int32_t*> tables;  // of each layer
    int64_t tokens;
  };

  // poison: NaN cache past the lengths, junk table entries. ranks: that share the tokens, of which
  // the lengths are of one; then queries' ends are told one by one.
  Problem make(const Shape& shape, int layers, bool causal, int ranks = 1) {
    Problem x;
    auto& p = x.params;
    p.b = shape.lengths.size(), p.s_q = shape.s_q, p.h_q = shape.h_q, p.h_kv = shape.h_kv,
    p.d_qk = kDqk, p.d_v = kDv;
    p.num_blocks = pool_blocks / shape.h_kv, p.block_size = kBlock;
    const int longest = *std::max_element(shape.lengths.begin(), shape.lengths.end());
    p.max_blocks = (longest + kBlock - 1) / kBlock + 3;
    p.num_parts = shape.num_parts, p.tile_rows = shape.tile_rows;
    p.format = flashmla::Format::kDense, p.row_stride = kDqk;
    p.block_bytes = int64_t{2} * kBlock * p.h_kv * kDqk;
    p.sm_scale = 1 / std::sqrt(576.0f), p.causal = causal, p.dtype = flashmla::DType::kBFloat16;
    x.tokens = std::accumulate(shape.lengths.begin(), shape.lengths.end(), int64_t{0});

    std::vector<int32_t> ids(p.num_blocks);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random);
    size_t next = 0;
    for (int layer = 0; layer < layers; ++layer) {
      std::vector<int32_t> table(size_t(p.b) * p.max_blocks, 2147480000);
      for (int i = 0; i < p.b; ++i)
        for (int t = 0; t < (shape.lengths[i] + kBlock - 1) / kBlock; ++t) {
          if (next == ids.size()) next = 0;
          table[size_t(i) * p.max_blocks + t] = ids[next++];
        }
      x.tables.push_back(upload(table));
    }
    const size_t rows = size_t(p.b) * p.s_q * p.h_q,
                 slots = size_t(2) * p.num_parts * p.s_q * p.h_q;
    p.q = alloc(rows * kDqk * 2);
    fill_normal<<<256, 256>>>((T*)p.q, rows * kDqk, 99, query_scale);
    p.cache_seqlens = upload(shape.lengths);
    if (ranks > 1) {
      std::vector<int32_t> seen;
      for (int i = 0; i < p.b; ++i) {
        const int end = shape.lengths[i] * ranks + i % ranks;  // in tokens of all ranks
        for (int j = 0; j < p.s_q; ++j) seen.push_back(std::max(end - (p.s_q - 1 - j), 0) / ranks);
      }
      p.seen = upload(seen);
    }
    p.cuts = (int32_t*)alloc((p.num_parts + 1) * 8);
    p.out = alloc(rows * kDv * 2), p.lse = (float*)alloc(rows * 4);
    p.out_accum = (float*)alloc(slots * kDv * 4), p.lse_accum = (float*)alloc(slots * 4);
    p.blocks = pool, p.block_table = x.tables[0];
    x.schedule = {p.b, p.num_parts, p.cache_seqlens, const_cast<int32_t*>(p.cuts)};
    return x;
  }

  bool check(const Shape& shape, bool causal, int ranks = 1) {
    Problem x = make(shape, 1, causal, ranks);
    const auto& p = x.params;
    CHECK_STATUS(flashmla::sm90::run_make_schedule(x.schedule, 0));
    CHECK_STATUS(flashmla::sm90::run_dense_decode(p, 0));
    CHECK(cudaDeviceSynchronize());
    const size_t rows = size_t(p.b) * p.s_q * p.h_q;
    const auto scores = (double*)alloc(rows * p.max_blocks * kBlock * 8);
    const auto out = (float*)alloc(rows * kDv * 4), lse = (float*)alloc(rows * 4);
    naive<<<rows, 256>>>(p, scores, p.max_blocks * kBlock, out, lse);
    CHECK(cudaDeviceSynchronize());
    const auto got = download<T>(p.out, rows * kDv);
    const auto want = download(out, rows * kDv);
    const int differing = differing_reruns(
        5, got, p.out, [&] { CHECK_STATUS(flashmla::sm90::run_dense_decode(p, 0)); });
    const Bounds bounds{8e-4, 2.01 / 128, 5e-6};
    const Errors errors = errors_of(got, want, bounds);
    const Errors of_lse =
        errors_of(download(p.lse, rows), download(lse, rows), {2e-6, 8.01 / 65536});
    const bool ok = errors.within(bounds) && of_lse.bad == 0 && differing == 0;
    std::printf(
        "%s %-34s causal %d, %d ranks: max error %.2e at row %zu col %zu, bad %zu/%zu, cosine "
        "%.1e, lse "
        "%.1e, reruns differing %d\n",
        ok ? "ok  " : "FAIL", shape.label.c_str(), causal, ranks, errors.worst,
        errors.worst_at / kDv, errors.worst_at % kDv, errors.bad, got.size(), errors.cosine,
        of_lse.worst, differing);
    release();
    return ok;
  }

  // Microseconds a call. layers: calls in the graph, a cache each; 0 takes as many as reach 256 MB.
  double time(const Shape& shape, int layers, int64_t& tokens) {
    tokens = std::accumulate(shape.lengths.begin(), shape.lengths.end(), int64_t{0});
    if (layers == 0)
      layers = std::clamp<int64_t>((int64_t{256} << 20) / (tokens * kDqk * 2) + 1, 8, 128);
    Problem x = make(shape, layers, true);
    CHECK_STATUS(flashmla::sm90::run_make_schedule(x.schedule, 0));
    cudaStream_t stream;
    cudaGraph_t graph;
    CHECK(cudaStreamCreate(&stream));
    const auto capture = [&](int first, int last) {
      cudaGraph_t captured;
      CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      for (int i = first; i < last; ++i) {
        x.params.block_table = x.tables[i];
        CHECK_STATUS(flashmla::sm90::run_dense_decode(x.params, stream));
      }
      CHECK(cudaStreamEndCapture(stream, &captured));
      return captured;
    };
    if (call_graphs) {
      CHECK(cudaGraphCreate(&graph, 0));
      cudaGraphNode_t before, node;
      for (int i = 0; i < layers; ++i) {
        cudaGraph_t call = capture(i, i + 1);
        CHECK(cudaGraphAddChildGraphNode(&node, graph, i > 0 ? &before : nullptr, i > 0, call));
        CHECK(cudaGraphDestroy(call));
        before = node;
      }
    } else {
      graph = capture(0, layers);
    }
    const double us = time_graph(graph, layers, stream, 100);
    CHECK(cudaStreamDestroy(stream));
    release();
    return us;
  }
};

int main(int argc, char** argv) {
  const std::string shapes_path = argc > 1 ? argv[1] : "";
  Bench bench;
  bench.pool_blocks = argc > 2 ? std::atoll(argv[2]) : 140000;
  if (argc > 3) bench.query_scale = std::atof(argv[3]);
  const int layers = argc > 4 ? std::atoi(argv[4]) : 0;
  bench.call_graphs = argc > 5 && std::strcmp(argv[5], "call_graphs") == 0;
  CHECK(cudaMalloc(&bench.pool, bench.pool_blocks * kBlock * kDqk * 2));
  fill_normal<<<1024, 256>>>(bench.pool, uint64_t(bench.pool_blocks) * kBlock * kDqk, 1, 0.1f);
  CHECK(cudaDeviceSynchronize());

  bool ok = true;
  std::mt19937 random(3);
  auto ragged = [&](int b, int longest) {
    std::vector<int> v(b);
    for (int& n : v) n = std::uniform_int_distribution<int>(0, longest)(random);
    return v;
  };
  std::vector<int> mostly_empty(3000);
  for (size_t i = 40; i < mostly_empty.size(); i += 70) mostly_empty[i] = 3 * i % 1000;
  const std::vector<Shape> checks = {
      {1, 64, 1, 132, 0, 0, "b1 h64 64", {64}},
      {1, 64, 1, 132, 0, 0, "b1 h64 20", {20}},
      {1, 64, 1, 132, 0, 0, "b1 h64 1000", {1000}},
      {1, 16, 1, 132, 0, 0, "b1 h16 20000", {20000}},
      {1, 1, 1, 132, 0, 0, "b3 h1", {140, 0, 333}},
      {2, 9, 3, 44, 0, 0, "b6 s2 h9 kv3 ragged", ragged(6, 4096)},
      {4, 128, 2, 16, 0, 0, "b2 s4 h128 kv2", {140, 4096}},
      {1, 128, 1, 66, 0, 0, "b64 h128 ragged 2000", ragged(64, 2000)},
      {2, 63, 1, 66, 0, 0, "b64 s2 h63 ragged 500", ragged(64, 500)},
      {2, 16, 1, 132, 0, 0, "b64 s2 h16 ragged 2000", ragged(64, 2000)},
      {1, 16, 1, 132, 0, 0, "b128 h16 4096", std::vector<int>(128, 4096)},
      {1, 128, 1, 66, 0, 0, "b132 h128 skewed",
       [] {
         std::vector<int> v(132, 200);
         v[60] = 65536;
         return v;
       }()},
      {1, 16, 1, 132, 0, 0, "b300 h16 ragged 200", ragged(300, 200)},
      {1, 16, 1, 132, 0, 0, "b3000 h16 mostly empty", mostly_empty},
      {1, 128, 1, 66, 0, 0, "b3000 h128 mostly empty", mostly_empty},
      {1, 128, 1, 16, 0, 0, "b1 h128 500, small tiles", {500}, 16},
      {1, 100, 1, 18, 0, 0, "b4 h100, small tiles", {500, 0, 64, 130}, 16},
      {2, 64, 2, 16, 0, 0, "b2 s2 h64 kv2, small tiles", {300, 70}, 16},
  };
  for (const Shape& shape : checks)
    for (bool causal : {false, true}) ok &= bench.check(shape, causal);
  for (const Shape& shape : checks)
    if (shape.s_q > 1) ok &= bench.check(shape, true, 3);
  if (!ok) std::printf("CHECKS FAILED\n");

  std::ifstream file(shapes_path);
  std::string line;
  GeometricMean of_limit, speed;
  while (std::getline(file, line)) {
    std::istringstream in(line);
    Shape shape;
    in >> shape.label >> shape.s_q >> shape.h_q >> shape.h_kv >> shape.num_parts >>
        shape.tile_rows >> shape.best_us >> shape.limit_us;
    for (int n; in >> n;) shape.lengths.push_back(n);
    int64_t tokens;
    const double us = bench.time(shape, layers, tokens);
    const double flops = 2.0 * tokens * shape.s_q * shape.h_q * (kDqk + kDv),
                 bytes = 2.0 * tokens * kDqk;
    std::printf("%-28s %9.2f us  limit %9.2f x%.2f  %6.1f TFLOP/s %7.1f GB/s", shape.label.c_str(),
                us, shape.limit_us, us / shape.limit_us, flops / us * 1e-6, bytes / us * 1e-3);
    of_limit.add(us / shape.limit_us);
    if (shape.best_us > 0) {
      std::printf("  best peer %9.2f, speed x%.3f", shape.best_us, shape.best_us / us);
      speed.add(shape.best_us / us);
    }
    std::printf("\n");
  }
  if (of_limit.count)
    std::printf("geometric mean: %.3f of the limit's time over %d shapes\n", of_limit.value(),
                of_limit.count);
  if (speed.count)
    std::printf("geometric mean: x%.3f the speed of the best peer over %d shapes\n", speed.value(),
                speed.count);
  return ok ? 0 : 1;
}
