// Times the Hopper kernels without JAX, in a CUDA graph captured by hand, and checks them against a
// naive kernel first. Shapes come from a file that shapes.py writes; see README.md beside this.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "sm90/dense_decode/launch.h"
#include "sm90/make_schedule/launch.h"

#define CHECK(call)                                                                        \
  do {                                                                                     \
    const cudaError_t error = (call);                                                      \
    if (error != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                        \
    }                                                                                      \
  } while (0)

#define CHECK_STATUS(call)                                    \
  do {                                                        \
    const flashmla::Status status = (call);                   \
    if (!status.ok()) {                                       \
      std::printf("%s: %s\n", #call, status.message.c_str()); \
      std::exit(1);                                           \
    }                                                         \
  } while (0)

using T = __nv_bfloat16;
constexpr int kDqk = 576, kDv = 512, kBlock = 64;

__device__ float noise(uint64_t i, uint32_t seed) {
  uint64_t x = i * 0x9E3779B97F4A7C15ull + seed;
  float sum = 0;
  for (int r = 0; r < 2; ++r) {
    x ^= x >> 31, x *= 0xBF58476D1CE4E5B9ull, x ^= x >> 27, x *= 0x94D049BB133111EBull;
    sum += float(uint32_t(x)) + float(uint32_t(x >> 32));
  }
  return (sum * 0x1p-32f - 2.0f) * 1.7320508f;  // mean 0, variance 1
}

__global__ void fill(T* p, uint64_t n, uint32_t seed, float scale) {
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < n;
       i += gridDim.x * uint64_t(blockDim.x))
    p[i] = __float2bfloat16(scale * noise(i, seed));
}

// One thread block a query row; scores in global memory.
__global__ void naive(flashmla::DenseDecodeParams p, float* scores, int max_tokens, float* out,
                      float* lse) {
  const int row = blockIdx.x, rows = p.s_q * p.h_q, sequence = row / rows;
  const int head = row % p.h_q, query = row % rows / p.h_q, kv = head / (p.h_q / p.h_kv);
  const int length = p.seen != nullptr
                         ? p.seen[sequence * p.s_q + query]
                         : p.cache_seqlens[sequence] - (p.causal ? p.s_q - 1 - query : 0);
  const T* q = static_cast<const T*>(p.q) + int64_t(row) * kDqk;
  float* s = scores + int64_t(row) * max_tokens;
  __shared__ float reduce[256];
  auto key = [&](int t) {
    const int64_t block = p.block_table[int64_t(sequence) * p.max_blocks + t / kBlock];
    return static_cast<const T*>(p.blocks) + ((block * kBlock + t % kBlock) * p.h_kv + kv) * kDqk;
  };
  float peak = -INFINITY;
  for (int t = threadIdx.x; t < length; t += 256) {
    float dot = 0;
    const T* k = key(t);
    for (int d = 0; d < kDqk; ++d) dot += __bfloat162float(q[d]) * __bfloat162float(k[d]);
    s[t] = dot * p.sm_scale;
    peak = fmaxf(peak, s[t]);
  }
  reduce[threadIdx.x] = peak;
  __syncthreads();
  for (int i = 0; i < 256; ++i) peak = fmaxf(peak, reduce[i]);
  __syncthreads();
  float sum = 0;
  for (int t = threadIdx.x; t < length; t += 256) sum += expf(s[t] - peak);
  reduce[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < 256; ++i) sum += reduce[i];
  for (int d = threadIdx.x; d < kDv; d += 256) {
    float o = 0;
    for (int t = 0; t < length; ++t) o += expf(s[t] - peak) * __bfloat162float(key(t)[d]);
    out[int64_t(row) * kDv + d] = length > 0 ? o / sum : 0;
  }
  if (threadIdx.x == 0) lse[row] = length > 0 ? peak + logf(sum) : -INFINITY;
}

struct Shape {
  int s_q, h_q, h_kv, num_parts;
  double best_us, limit_us;  // best_us 0: no peer is recorded
  std::string label;
  std::vector<int> lengths;
  int tile_rows = 64;  // of the schedule, as num_parts
};

struct Bench {
  T* pool;
  int64_t pool_blocks;
  float query_scale = 10;    // scores then have standard deviation 1
  int rest_ms = 100;         // before a shape: a hot GPU's clock is low
  bool call_graphs = false;  // each call a child graph, as XLA makes them
  std::mt19937 random{7};

  template <typename V>
  V* upload(const std::vector<V>& v) {
    V* d;
    CHECK(cudaMalloc(&d, v.size() * sizeof(V)));
    CHECK(cudaMemcpy(d, v.data(), v.size() * sizeof(V), cudaMemcpyHostToDevice));
    return d;
  }

  struct Problem {
    flashmla::DenseDecodeParams params{};
    flashmla::MakeScheduleParams schedule{};
    std::vector<const int32_t*> tables;  // of each layer
    std::vector<void*> allocations;
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
      x.allocations.push_back((void*)x.tables.back());
    }
    auto alloc = [&](size_t bytes) {
      void* d;
      CHECK(cudaMalloc(&d, std::max<size_t>(bytes, 16)));
      CHECK(cudaMemset(d, 0xFF, bytes));
      x.allocations.push_back(d);
      return d;
    };
    const size_t rows = size_t(p.b) * p.s_q * p.h_q,
                 slots = size_t(2) * p.num_parts * p.s_q * p.h_q;
    p.q = alloc(rows * kDqk * 2);
    fill<<<256, 256>>>((T*)p.q, rows * kDqk, 99, query_scale);
    p.cache_seqlens = upload(shape.lengths);
    x.allocations.push_back((void*)p.cache_seqlens);
    if (ranks > 1) {
      std::vector<int32_t> seen;
      for (int i = 0; i < p.b; ++i) {
        const int end = shape.lengths[i] * ranks + i % ranks;  // in tokens of all ranks
        for (int j = 0; j < p.s_q; ++j) seen.push_back(std::max(end - (p.s_q - 1 - j), 0) / ranks);
      }
      p.seen = upload(seen);
      x.allocations.push_back((void*)p.seen);
    }
    p.cuts = (int32_t*)alloc((p.num_parts + 1) * 8);
    p.out = alloc(rows * kDv * 2), p.lse = (float*)alloc(rows * 4);
    p.out_accum = (float*)alloc(slots * kDv * 4), p.lse_accum = (float*)alloc(slots * 4);
    p.blocks = pool, p.block_table = x.tables[0];
    x.schedule = {p.b, p.num_parts, p.cache_seqlens, const_cast<int32_t*>(p.cuts)};
    return x;
  }

  void release(Problem& x) {
    for (void* d : x.allocations) CHECK(cudaFree(d));
  }

  bool check(const Shape& shape, bool causal, int ranks = 1) {
    Problem x = make(shape, 1, causal, ranks);
    const auto& p = x.params;
    CHECK_STATUS(flashmla::sm90::run_make_schedule(x.schedule, 0));
    CHECK_STATUS(flashmla::sm90::run_dense_decode(p, 0));
    CHECK(cudaDeviceSynchronize());
    const size_t rows = size_t(p.b) * p.s_q * p.h_q;
    float *scores, *out, *lse;
    CHECK(cudaMalloc(&scores, rows * p.max_blocks * kBlock * 4));
    CHECK(cudaMalloc(&out, rows * kDv * 4));
    CHECK(cudaMalloc(&lse, rows * 4));
    naive<<<rows, 256>>>(p, scores, p.max_blocks * kBlock, out, lse);
    CHECK(cudaDeviceSynchronize());
    std::vector<T> got(rows * kDv), again(rows * kDv);
    std::vector<float> want(rows * kDv), got_lse(rows), want_lse(rows);
    CHECK(cudaMemcpy(got.data(), p.out, got.size() * 2, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(want.data(), out, want.size() * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(got_lse.data(), p.lse, rows * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(want_lse.data(), lse, rows * 4, cudaMemcpyDeviceToHost));
    int differing = 0;
    for (int rerun = 0; rerun < 5; ++rerun) {
      CHECK_STATUS(flashmla::sm90::run_dense_decode(p, 0));
      CHECK(cudaMemcpy(again.data(), p.out, again.size() * 2, cudaMemcpyDeviceToHost));
      differing += std::memcmp(again.data(), got.data(), got.size() * 2) != 0;
    }
    double worst = 0, dot = 0, a2 = 0, b2 = 0, worst_lse = 0;
    size_t worst_at = 0, bad = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      const double a = __bfloat162float(got[i]), b = want[i], e = std::abs(a - b);
      if (!(e <= 8e-4 + 2.01 / 128 * std::abs(b))) ++bad;
      if (!(e <= worst)) worst = e, worst_at = i;
      dot += a * b, a2 += a * a, b2 += b * b;
    }
    for (size_t i = 0; i < rows; ++i)
      if (!(got_lse[i] == want_lse[i]))
        worst_lse =
            std::max(worst_lse, (double)std::abs(got_lse[i] - want_lse[i]) + 0.0 * want_lse[i]),
        worst_lse = std::isnan(got_lse[i]) ? 1e9 : worst_lse;
    const bool ok = bad == 0 && worst_lse < 1e-4 && differing == 0;
    std::printf(
        "%s %-34s causal %d, %d ranks: max error %.2e at row %zu col %zu, bad %zu/%zu, cosine "
        "%.1e, lse "
        "%.1e, reruns differing %d\n",
        ok ? "ok  " : "FAIL", shape.label.c_str(), causal, ranks, worst, worst_at / kDv,
        worst_at % kDv, bad, got.size(), 1 - 2 * dot / std::max(a2 + b2, 1e-30), worst_lse,
        differing);
    CHECK(cudaFree(scores));
    CHECK(cudaFree(out));
    CHECK(cudaFree(lse));
    release(x);
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
    cudaGraphExec_t exec;
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
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t start, stop;
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&stop));
    std::vector<float> times;
    std::this_thread::sleep_for(std::chrono::milliseconds(rest_ms));
    for (int i = 0; i < 12; ++i) {
      CHECK(cudaEventRecord(start, stream));
      CHECK(cudaGraphLaunch(exec, stream));
      CHECK(cudaEventRecord(stop, stream));
      CHECK(cudaStreamSynchronize(stream));
      float ms;
      CHECK(cudaEventElapsedTime(&ms, start, stop));
      if (i >= 3) times.push_back(ms * 1000 / layers);
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
    release(x);
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
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
  fill<<<1024, 256>>>(bench.pool, uint64_t(bench.pool_blocks) * kBlock * kDqk, 1, 0.1f);
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
  double log_ratio = 0, log_limit = 0;
  int count = 0, compared = 0;
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
    log_limit += std::log(us / shape.limit_us), ++count;
    if (shape.best_us > 0) {
      std::printf("  best peer %9.2f, speed x%.3f", shape.best_us, shape.best_us / us);
      log_ratio += std::log(shape.best_us / us), ++compared;
    }
    std::printf("\n");
  }
  if (count)
    std::printf("geometric mean: %.3f of the limit's time over %d shapes\n",
                std::exp(log_limit / count), count);
  if (compared)
    std::printf("geometric mean: x%.3f the speed of the best peer over %d shapes\n",
                std::exp(log_ratio / compared), compared);
  return ok ? 0 : 1;
}
