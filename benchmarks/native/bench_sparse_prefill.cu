// Times the Hopper sparse prefill kernel without JAX, in a CUDA graph captured by hand, and checks
// it against a naive kernel first. See README.md beside this.
#include <cmath>
#include <cstring>
#include <fstream>
#include <random>
#include <sstream>
#include <string>

#include "graph_time.cuh"
#include "naive_sparse_prefill.cuh"
#include "sm90/sparse_prefill/launch.h"

using flashmla::SparsePrefillParams;
using bf16 = __nv_bfloat16;

struct Shape {
  int s_q, h_q, d_qk, topk, s_kv;
};

struct Hostility {
  bool fillers = false;  // indices outside kv
  bool lengths = false;  // topk_length
  bool sinks = false;
  bool none_valid = false;
  float query_scale = 10;  // 10: scores have a standard deviation of 1
};

struct Bench {
  std::mt19937 random{7};
  std::vector<void*> allocations;

  void* alloc(size_t bytes) {
    void* d;
    CHECK(cudaMalloc(&d, std::max<size_t>(bytes, 16)));
    CHECK(cudaMemset(d, 0xFF, std::max<size_t>(bytes, 16)));
    allocations.push_back(d);
    return d;
  }

  template <typename V>
  V* upload(const std::vector<V>& v) {
    V* d = (V*)alloc(v.size() * sizeof(V));
    CHECK(cudaMemcpy(d, v.data(), v.size() * sizeof(V), cudaMemcpyHostToDevice));
    return d;
  }

  template <typename V>
  std::vector<V> download(const void* d, size_t n) {
    std::vector<V> v(n);
    CHECK(cudaMemcpy(v.data(), d, n * sizeof(V), cudaMemcpyDeviceToHost));
    return v;
  }

  void release() {
    for (void* d : allocations) CHECK(cudaFree(d));
    allocations.clear();
  }

  int uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

  template <typename T>
  SparsePrefillParams make(const Shape& x, int step, float query_scale) {
    SparsePrefillParams p{};
    p.s_q = x.s_q, p.h_q = x.h_q, p.s_kv = x.s_kv, p.d_qk = x.d_qk, p.d_v = 512, p.topk = x.topk;
    p.dtype = std::is_same_v<T, bf16> ? flashmla::DType::kBFloat16 : flashmla::DType::kFloat16;
    p.sm_scale = 1 / std::sqrt(float(x.d_qk));
    const size_t rows = size_t(x.s_q) * x.h_q;
    T *q = (T*)alloc(rows * x.d_qk * 2), *kv = (T*)alloc(size_t(x.s_kv) * x.d_qk * 2);
    fill_normal<<<1024, 256>>>(q, rows * x.d_qk, 99, query_scale);
    fill_rows<<<1024, 128>>>(kv, x.s_kv, x.d_qk, step, 3);
    p.q = q, p.kv = kv;
    p.out = alloc(rows * 512 * 2);
    p.lse = (float*)alloc(rows * 4), p.max_logits = (float*)alloc(rows * 4);
    return p;
  }

  template <typename T>
  bool check(const Shape& x, const Hostility& h) {
    SparsePrefillParams p = make<T>(x, 2, h.query_scale);  // odd rows are NaN
    std::vector<int32_t> lengths(x.s_q, x.topk), indices(size_t(x.s_q) * x.topk);
    if (h.lengths)
      for (int& l : lengths) l = uniform(0, 3) ? uniform(-3, x.topk + 3) : uniform(0, 1) * 65;
    const int32_t fillers[] = {-1, INT32_MIN, -123456, x.s_kv, INT32_MAX, 2147480000, x.s_kv + 77};
    for (int i = 0; i < x.s_q; ++i)
      for (int t = 0; t < x.topk; ++t) {
        int32_t& index = indices[size_t(i) * x.topk + t];
        index = uniform(0, (x.s_kv - 1) / 2) * 2;
        if (t >= lengths[i]) index = uniform(0, 1) && index + 1 < x.s_kv ? index + 1 : -1;
        if (h.none_valid || (h.fillers && uniform(0, 2) == 0)) index = fillers[uniform(0, 6)];
      }
    p.indices = upload(indices);
    if (h.lengths) p.topk_length = upload(lengths);
    if (h.sinks) {
      std::vector<float> sinks(x.h_q);
      for (float& s : sinks) {
        const int kind = uniform(0, 2);
        s = kind == 0 ? INFINITY : kind == 1 ? -INFINITY : 0.1f * uniform(-20, 100);
      }
      p.attn_sink = upload(sinks);
    }
    const bool ok = compare<T>(x, h, p);
    release();
    return ok;
  }

  template <typename T>
  bool compare(const Shape& x, const Hostility& h, const SparsePrefillParams& p) {
    const size_t rows = size_t(p.s_q) * p.h_q, n = rows * 512;
    double* scores = (double*)alloc(rows * x.topk * 8);
    float *out = (float*)alloc(n * 4), *lse = (float*)alloc(rows * 4);
    float* max_logits = (float*)alloc(rows * 4);
    CHECK_STATUS(flashmla::sm90::run_sparse_prefill(p, 0));
    naive<T><<<rows, 256>>>(p, scores, out, lse, max_logits);
    CHECK(cudaDeviceSynchronize());
    const auto got = download<T>(p.out, n);
    const auto want = download<float>(out, n);
    int differing = 0;
    for (int rerun = 0; rerun < 4; ++rerun) {
      CHECK_STATUS(flashmla::sm90::run_sparse_prefill(p, 0));
      const auto again = download<T>(p.out, n);
      differing += std::memcmp(again.data(), got.data(), n * 2) != 0;
    }
    double worst = 0, dot = 0, squares = 0, worst_lse = 0;
    size_t bad = 0, bad_lse = 0, first_bad = ~size_t{0};
    for (size_t i = 0; i < n; ++i) {
      const double a = float(got[i]), b = want[i], e = std::abs(a - b);
      if (!(e <= 8e-4 || e <= 3.01 / 128 * std::abs(b))) ++bad, first_bad = std::min(first_bad, i);
      worst = std::max(worst, e), dot += a * b, squares += a * a + b * b;
    }
    for (const auto& [have, expect] :
         {std::pair(p.lse, lse), std::pair(p.max_logits, max_logits)}) {
      const auto a = download<float>(have, rows), b = download<float>(expect, rows);
      for (size_t i = 0; i < rows; ++i) {
        if (a[i] == b[i]) continue;
        const double e = std::abs(double(a[i]) - b[i]);
        if (!(e <= 1e-6 * h.query_scale || e <= 2.01 / 65536 * std::abs(b[i]))) ++bad_lse;
        worst_lse = std::max(worst_lse, e);
      }
    }
    const double cosine = squares > 0 ? 1 - 2 * dot / squares : 0;
    const bool ok = bad == 0 && bad_lse == 0 && differing == 0 && cosine < 7e-6;
    std::printf(
        "%s %s s%d h%d d%d topk %d of %d%s%s%s%s: max error %.1e, bad %zu/%zu, cosine %.1e, lse "
        "%.1e, bad %zu, reruns differing %d\n",
        ok ? "ok  " : "FAIL", std::is_same_v<T, bf16> ? "bf16" : "f16", x.s_q, x.h_q, x.d_qk,
        x.topk, x.s_kv, h.fillers ? " fillers" : "", h.lengths ? " lengths" : "",
        h.sinks ? " sinks" : "", h.none_valid ? " none" : "", worst, bad, n, cosine, worst_lse,
        bad_lse, differing);
    if (bad)
      std::printf("     first bad: row %zu column %zu, got %g, want %g\n", first_bad / 512,
                  first_bad % 512, float(got[first_bad]), want[first_bad]);
    std::fflush(stdout);
    return ok;
  }

  // Microseconds a call: calls in a graph, over rows and indices of their own, that read 256 MB
  // together.
  double time(const Shape& x) {
    SparsePrefillParams p = make<bf16>(x, 1, 10);
    const int64_t entries = int64_t(x.s_q) * x.topk;
    const int64_t bytes = std::min<int64_t>(entries, x.s_kv) * x.d_qk * 2;
    const int calls = std::clamp<int64_t>((int64_t{256} << 20) / bytes + 1, 2, 128);
    std::vector<std::pair<const void*, const int32_t*>> inputs;
    for (int call = 0; call < calls; ++call) {
      bf16* kv = (bf16*)alloc(size_t(x.s_kv) * x.d_qk * 2);
      int32_t* indices = (int32_t*)alloc(entries * 4);
      fill_rows<<<1024, 128>>>(kv, x.s_kv, x.d_qk, 1, call);
      fill_indices<<<1024, 256>>>(indices, entries, x.s_kv, call + 1000);
      inputs.emplace_back(kv, indices);
    }
    CHECK(cudaDeviceSynchronize());
    const double us = time_calls(calls, [&](int call, cudaStream_t stream) {
      std::tie(p.kv, p.indices) = inputs[call];
      CHECK_STATUS(flashmla::sm90::run_sparse_prefill(p, stream));
    });
    release();
    return us;
  }
};

bool run_checks(Bench& bench, bool small) {
  const Hostility plain{}, all{true, true, true, false};
  bool ok = bench.check<bf16>({1, 64, 576, 64, 128}, plain);
  ok &= bench.check<bf16>({3, 128, 512, 300, 700}, all);
  ok &= bench.check<__half>({2, 20, 576, 65, 95}, all);
  if (small) return ok;
  // FlashMLA's tests, and other numbers of heads.
  const int space[][2] = {{128, 128},  {256, 256},  {512, 512}, {592, 128}, {1840, 256},
                          {1592, 384}, {1521, 512}, {95, 128},  {153, 256}, {114, 384}};
  int i = 0;
  for (const auto& [s_kv, topk] : space)
    for (const int d_qk : {576, 512}) {
      const int s_q = i % 3 == 0 ? 1 : i % 3 == 1 ? 62 : 213, h_q = i % 2 ? 64 : 128;
      ok &= bench.check<bf16>({s_q, h_q, d_qk, topk, s_kv}, {i % 4 > 0, i % 4 > 1, i % 4 > 2});
      ok &= bench.check<__half>({70, 1 + 37 * i % 200, d_qk, topk + i, s_kv}, all);
      ++i;
    }
  for (const int h_q : {64, 128}) {
    ok &= bench.check<bf16>({300, h_q, 576, 128, 700}, {false, false, true, true});
    ok &= bench.check<bf16>({400, h_q, 576, 1, 50}, all);
    ok &= bench.check<bf16>({1000, h_q, 576, 200, 3000}, {true, true, true, false, 100});
    ok &= bench.check<bf16>({300, h_q, 576, 2048, 5000}, plain);
  }
  ok &= bench.check<bf16>({70000, 1, 576, 64, 700}, all);
  return ok;
}

int main(int argc, char** argv) {
  const std::string rows_path = argc > 1 ? argv[1] : "";
  Bench bench;
  const bool small = rows_path == "small";
  bool ok = true;
  if (argc <= 2 || std::strcmp(argv[2], "time") != 0) ok = run_checks(bench, small);
  if (!ok) std::printf("CHECKS FAILED\n");
  if (rows_path.empty() || small) return ok ? 0 : 1;

  std::ifstream file(rows_path);
  std::string line;
  double log_ratio = 0;
  int compared = 0;
  while (std::getline(file, line)) {
    std::istringstream in(line);
    Shape x;
    double peer_us = 0;
    in >> x.s_q >> x.h_q >> x.d_qk >> x.topk >> x.s_kv >> peer_us;
    const double us = bench.time(x), pairs = double(x.s_q) * x.topk;
    std::printf("s%d h%d d%d topk %d of %d: %8.1f us %6.1f TFLOP/s %5.2f TB/s", x.s_q, x.h_q,
                x.d_qk, x.topk, x.s_kv, us, pairs * x.h_q * 2 * (x.d_qk + 512) / us * 1e-6,
                pairs * ((x.h_q + 63) / 64) * x.d_qk * 2 / us * 1e-6);
    if (peer_us > 0) {
      std::printf("  peer %8.1f, speed x%.3f", peer_us, peer_us / us);
      log_ratio += std::log(peer_us / us), ++compared;
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  if (compared)
    std::printf("geometric mean: x%.3f the speed of the peer over %d rows\n",
                std::exp(log_ratio / compared), compared);
  return ok ? 0 : 1;
}
