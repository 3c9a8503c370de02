// Times what a decoding layer projects, without JAX: each product a call (a child graph, as XLA
// makes them), and products that follow one another in one call. Checks both against a naive
// product first. DeepSeek V3's sizes; see README.md beside this.
#include <cuda_bf16.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "graph_time.cuh"
#include "noise.cuh"
#include "sm90/latent_append/launch.h"
#include "sm90/project/launch.h"

using namespace flashmla;
using T = __nv_bfloat16;
using Call = std::function<void(cudaStream_t)>;

constexpr int kHidden = 7168, kQRank = 1536, kRank = 512, kNope = 128, kRope = 64, kV = 128;
constexpr int kBlock = 64, kIndexHeads = 64;

template <class V>
V* make(size_t n, uint32_t seed = 0, float scale = 0) {
  V* data;
  CHECK(cudaMalloc(&data, n * sizeof(V)));
  CHECK(cudaMemset(data, 0, n * sizeof(V)));
  if (scale != 0) fill_normal<<<512, 256>>>(data, n, seed, scale);
  return data;
}

// One thread an element of y, without its rotated columns.
__global__ void naive(ProjectParams p, float* y) {
  const int64_t at = blockIdx.x * int64_t{256} + threadIdx.x;
  if (at >= int64_t{p.rows} * p.groups * p.n) return;
  int j = static_cast<int>(at % p.n), weight = 0;
  const int64_t group = at / p.n % p.groups, row = at / p.n / p.groups;
  while (j >= p.n_of[weight]) j -= p.n_of[weight++];
  const T* x = static_cast<const T*>(p.x) + (row * p.groups + group) * (p.k + p.rope);
  const T* w = static_cast<const T*>(p.w[weight]) + group * p.k * p.n_of[weight];
  float sum = 0;
  for (int64_t l = 0; l < p.k; ++l) {
    const T v = p.transposed ? w[j * int64_t{p.k} + l] : w[l * p.n_of[weight] + j];
    sum += __bfloat162float(x[l]) * __bfloat162float(v);
  }
  y[at] = sum;
}

// One thread a product with the float32 weight.
__global__ void naive_exact(ProjectParams p, double* y) {
  const int at = blockIdx.x * 256 + threadIdx.x, row = at / p.exact_n, j = at % p.exact_n;
  if (row >= p.rows) return;
  const T* x = static_cast<const T*>(p.x) + int64_t{row} * p.k;
  double sum = 0;
  for (int64_t l = 0; l < p.k; ++l) {
    sum += double(__bfloat162float(x[l])) * p.exact_w[l * p.exact_n + j];
  }
  y[at] = sum;
}

// A layer's weights, what it makes, and its calls.
struct Layer {
  ProjectParams down{}, up{}, uk{}, uv{}, o{};
  LatentAppendParams append{};
  size_t weight_bytes = 0;

  ProjectParams product(int rows, int groups, int k, std::vector<int> n, int rope, const T* x,
                        bool transposed = false) {
    ProjectParams p{};
    p.dtype = DType::kBFloat16;
    p.rows = rows, p.groups = groups, p.k = k, p.rope = rope, p.transposed = transposed;
    p.layout = rope > 0 ? RopeLayout::kDeinterleaved : RopeLayout::kNone;
    static uint32_t seed = 1;
    for (size_t i = 0; i < n.size(); ++i) {
      const size_t elements = size_t(groups) * k * n[i];
      p.w[i] = make<T>(elements, ++seed, 1 / std::sqrt(float(k)));
      p.n += p.n_of[i] = n[i];
      weight_bytes += 2 * elements;
    }
    p.x = x;
    auto* y = make<T>(size_t(rows) * groups * (p.n + rope));
    p.y = y;
    for (int i = 0, to = 0; i < kMaxWeights; to += p.n_of[i++]) p.out[i] = {y + to, p.n + rope};
    return p;
  }

  Layer(int rows, int heads, const T* x, const T* attended, const float* angles) {
    down = product(rows, 1, kHidden, {kQRank, kRank + kRope}, 0, x);
    append.cache.b = rows, append.cache.s_new = 1, append.cache.max_blocks = 1;
    append.cache.block_size = kBlock, append.cache.num_blocks = rows;
    append.cache.block_bytes = kBlock * (kRank + kRope) * 2;
    append.cache.format = Format::kDense, append.cache.rows_dtype = DType::kBFloat16;
    append.cache.h_kv = 1, append.cache.d = append.cache.row_stride = kRank + kRope;
    append.cache.updated = make<T>(size_t(rows) * kBlock * (kRank + kRope));
    append.cache.blocks = append.cache.updated;
    std::vector<int32_t> table(rows), ones(rows, 1);
    for (int i = 0; i < rows; ++i) table[i] = rows - 1 - i;
    auto upload = [&](const std::vector<int32_t>& v) {
      auto* d = make<int32_t>(v.size());
      CHECK(cudaMemcpy(d, v.data(), v.size() * 4, cudaMemcpyHostToDevice));
      return d;
    };
    append.cache.block_table = upload(table);
    append.cache.positions = append.cache.num_new = upload(ones);
    append.dtype = append.norm_dtype = DType::kBFloat16;
    append.columns = down.n, append.q_rank = kQRank, append.kv_rank = kRank, append.rope = kRope;
    append.layout = RopeLayout::kDeinterleaved;
    append.q_eps = append.kv_eps = 1e-6f, append.latent_scale = 1;
    append.projected = down.y;
    append.q_norm = make<T>(kQRank, 5, 1), append.kv_norm = make<T>(kRank, 6, 1);
    append.cos = angles, append.sin = angles + rows * kRope / 2;
    auto* latent = make<T>(size_t(rows) * kQRank);
    append.q_latent = latent;
    up = product(rows, 1, kQRank, {heads * (kNope + kRope)}, 0, latent);
    uk = product(rows, heads, kNope, {kRank}, kRope, static_cast<const T*>(up.y));
    uk.cos = append.cos, uk.sin = append.sin;
    uv = product(rows, heads, kRank, {kV}, 0, attended, true);
    o = product(rows, 1, heads * kV, {kHidden}, 0, static_cast<const T*>(uv.y));
  }

  std::vector<const ProjectParams*> products() const { return {&down, &up, &uk, &uv, &o}; }
  void poison() const {
    for (const auto* p : products()) {
      CHECK(cudaMemset(p->y, 0xFF, size_t(p->rows) * p->groups * (p->n + p->rope) * 2));
    }
    CHECK(cudaMemset(append.q_latent, 0xFF, size_t(append.cache.b) * kQRank * 2));
  }

  std::vector<Call> calls() const {
    const auto project = [](const ProjectParams& p) -> Call {
      return [&p](cudaStream_t stream) { CHECK_STATUS(sm90::run_project(p, stream)); };
    };
    return {project(down),
            [this](cudaStream_t stream) { CHECK_STATUS(sm90::run_latent_append(append, stream)); },
            project(up),
            project(uk),
            project(uv),
            project(o)};
  }
  std::vector<Call> pairs() const {
    std::vector<Call> calls = this->calls();
    return {calls[0], calls[1], [this](cudaStream_t stream) { queries(stream); },
            [this](cudaStream_t stream) { output(stream); }};
  }
  std::vector<Call> threes() const {
    return {calls()[0],
            [this](cudaStream_t stream) {
              CHECK_STATUS(sm90::run_latent_append(append, stream, false));
              CHECK_STATUS(sm90::run_project(up, stream, true));
              CHECK_STATUS(sm90::run_project(uk, stream, true));
            },
            [this](cudaStream_t stream) { output(stream); }};
  }
  std::vector<Call> chains() const {
    return {[this](cudaStream_t stream) {
              CHECK_STATUS(sm90::run_project(down, stream));
              CHECK_STATUS(sm90::run_latent_append(append, stream, true));
              CHECK_STATUS(sm90::run_project(up, stream, true));
              CHECK_STATUS(sm90::run_project(uk, stream, true));
            },
            [this](cudaStream_t stream) { output(stream); }};
  }
  void queries(cudaStream_t stream) const {
    CHECK_STATUS(sm90::run_project(up, stream));
    CHECK_STATUS(sm90::run_project(uk, stream, true));
  }
  void output(cudaStream_t stream) const {
    CHECK_STATUS(sm90::run_project(uv, stream));
    CHECK_STATUS(sm90::run_project(o, stream, true));
  }
};

std::vector<T> download(const ProjectParams& p) {
  std::vector<T> y(size_t(p.rows) * p.groups * (p.n + p.rope));
  CHECK(cudaMemcpy(y.data(), p.y, y.size() * 2, cudaMemcpyDeviceToHost));
  return y;
}

bool check_products(const Layer& layer) {
  layer.poison();
  for (const Call& call : layer.calls()) call(nullptr);
  CHECK(cudaDeviceSynchronize());
  bool ok = true;
  for (const auto* p : layer.products()) {
    const size_t n = size_t(p->rows) * p->groups * p->n;
    auto* y = make<float>(n);
    naive<<<(n + 255) / 256, 256>>>(*p, y);
    std::vector<float> want(n);
    CHECK(cudaMemcpy(want.data(), y, n * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaFree(y));
    const std::vector<T> got = download(*p);
    size_t bad = 0;
    for (size_t i = 0; i < n; ++i) {
      const float error =
          std::abs(__bfloat162float(got[i / p->n * (p->n + p->rope) + i % p->n]) - want[i]);
      bad += !(error <= 1e-3f + std::abs(want[i]) / 128);
    }
    if (bad > 0) std::printf("FAIL %d x %d x %d: %zu of %zu\n", p->groups, p->k, p->n, bad, n);
    ok &= bad == 0;
  }
  return ok;
}

// Calls with several kernels give the bits of calls with one.
bool check_chains(const Layer& layer) {
  std::vector<std::vector<T>> want;
  for (const auto* p : layer.products()) want.push_back(download(*p));
  int differing = 0;
  for (int rerun = 0; rerun < 12; ++rerun) {
    layer.poison();
    const auto calls = rerun % 2 == 0 ? layer.pairs() : layer.chains();
    for (const Call& call : calls) call(nullptr);
    CHECK(cudaDeviceSynchronize());
    for (size_t i = 0; i < want.size(); ++i) {
      const std::vector<T> got = download(*layer.products()[i]);
      differing += std::memcmp(got.data(), want[i].data(), got.size() * 2) != 0;
    }
  }
  if (differing > 0) std::printf("FAIL %d results of calls in one differ\n", differing);
  return differing == 0;
}

// The down-projection with the weights of an indexer's heads beside it.
ProjectParams with_exact(const Layer& layer) {
  ProjectParams p = layer.down;
  p.exact_n = kIndexHeads;
  p.exact_w = make<float>(size_t(p.k) * p.exact_n, 93, 1 / std::sqrt(float(p.k)));
  p.exact_y = make<float>(size_t(p.rows) * p.exact_n);
  return p;
}

bool check_exact(const ProjectParams& p) {
  const size_t n = size_t(p.rows) * p.exact_n;
  auto* y = make<double>(n);
  naive_exact<<<(n + 255) / 256, 256>>>(p, y);
  std::vector<double> want(n);
  CHECK(cudaMemcpy(want.data(), y, n * sizeof(double), cudaMemcpyDeviceToHost));
  CHECK(cudaFree(y));
  std::vector<float> first;
  for (int rerun = 0; rerun < 4; ++rerun) {
    CHECK(cudaMemset(p.exact_y, 0xFF, n * sizeof(float)));
    CHECK_STATUS(sm90::run_project(p, nullptr));
    std::vector<float> got(n);
    CHECK(cudaMemcpy(got.data(), p.exact_y, n * sizeof(float), cudaMemcpyDeviceToHost));
    if (rerun == 0) first = got;
    size_t bad = std::memcmp(got.data(), first.data(), n * sizeof(float)) != 0;
    for (size_t i = 0; i < n; ++i) bad += !(std::abs(got[i] - want[i]) <= 5e-6);
    if (bad > 0) {
      std::printf("FAIL float32 weight: %zu of %zu\n", bad, n);
      return false;
    }
  }
  return true;
}

double time_layers(const std::vector<std::vector<Call>>& layers) {
  constexpr int kRounds = 2;
  cudaStream_t stream;
  cudaGraph_t graph, captured;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaGraphCreate(&graph, 0));
  cudaGraphNode_t before, node;
  int nodes = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (const auto& layer : layers) {
      for (const Call& call : layer) {
        CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        call(stream);
        CHECK(cudaStreamEndCapture(stream, &captured));
        const bool first = nodes++ == 0;
        CHECK(
            cudaGraphAddChildGraphNode(&node, graph, first ? nullptr : &before, !first, captured));
        CHECK(cudaGraphDestroy(captured));
        before = node;
      }
    }
  }
  const double us = time_graph(graph, kRounds * static_cast<int>(layers.size()), stream, 5);
  CHECK(cudaStreamDestroy(stream));
  return us;
}

int main(int argc, char** argv) {
  const bool small = argc > 1 && std::string(argv[1]) == "small";  // one shape's checks alone
  bool ok = true;
  for (const auto [rows, heads] : {std::pair{1, 16},
                                   {4, 16},
                                   {8, 16},
                                   {16, 16},
                                   {32, 16},
                                   {128, 16},
                                   {1, 128},
                                   {16, 128},
                                   {32, 128}}) {
    auto* x = make<T>(size_t(rows) * kHidden, 90, 1);
    auto* attended = make<T>(size_t(rows) * heads * kRank, 91, 1);
    auto* angles = make<float>(size_t(rows) * kRope, 92, 1);
    std::vector<Layer> layers;
    // So many that no L2 holds even the smallest of their weights.
    for (int i = 0; i < (heads == 16 ? 24 : 4); ++i)
      layers.emplace_back(rows, heads, x, attended, angles);
    CHECK(cudaDeviceSynchronize());
    std::vector<ProjectParams> exact;
    for (const Layer& layer : layers) exact.push_back(with_exact(layer));
    const bool right =
        check_products(layers[0]) && check_chains(layers[0]) && check_exact(exact[0]);
    ok &= right;
    if (small) {
      std::printf("%s rows %d, heads %d\n", right ? "ok  " : "FAIL", rows, heads);
      break;
    }
    const auto time = [&](const std::function<std::vector<Call>(const Layer&)>& calls) {
      std::vector<std::vector<Call>> all;
      for (const Layer& layer : layers) all.push_back(calls(layer));
      return time_layers(all);
    };
    std::printf("%s rows %3d, heads %3d, %5.1f MB:", right ? "ok  " : "FAIL", rows, heads,
                layers[0].weight_bytes * 1e-6);
    const char* names[] = {"down", "append", "up", "uk", "uv", "o"};
    for (int i = 0; i < 6; ++i) {
      std::printf(" %s %.1f", names[i],
                  time([&](const Layer& l) { return std::vector<Call>{l.calls()[i]}; }));
    }
    std::vector<std::vector<Call>> downs;
    for (const ProjectParams& p : exact) {
      downs.push_back({[&p](cudaStream_t stream) { CHECK_STATUS(sm90::run_project(p, stream)); }});
    }
    std::printf("; down with float32 weights %.1f", time_layers(downs));
    std::printf("; six calls %.1f, four %.1f, three %.1f, two %.1f us\n",
                time([](const Layer& l) { return l.calls(); }),
                time([](const Layer& l) { return l.pairs(); }),
                time([](const Layer& l) { return l.threes(); }),
                time([](const Layer& l) { return l.chains(); }));
    std::fflush(stdout);
    for (const ProjectParams& p : exact) CHECK(cudaFree(const_cast<float*>(p.exact_w)));
    for (const Layer& layer : layers) {
      for (const auto* p : layer.products()) {
        for (const void* w : p->w) CHECK(cudaFree(const_cast<void*>(w)));
      }
    }
  }
  return ok ? 0 : 1;
}
