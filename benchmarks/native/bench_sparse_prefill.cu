// Times the Hopper sparse prefill kernel without JAX, in a CUDA graph captured by hand, and checks
// it against a naive kernel first. See README.md beside this.
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "compare.h"
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

struct Bench : DeviceArrays {
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
    const int differing = differing_reruns(
        4, got, p.out, [&] { CHECK_STATUS(flashmla::sm90::run_sparse_prefill(p, 0)); });
    const Bounds bounds{8e-4, 3.01 / 128, 7e-6}, of_lse{1e-6 * h.query_scale, 2.01 / 65536};
    const Errors errors = errors_of(got, want, bounds);
    const Errors of_sums = errors_of(download(p.lse, rows), download(lse, rows), of_lse);
    const Errors of_peaks =
        errors_of(download(p.max_logits, rows), download(max_logits, rows), of_lse);
    const size_t bad_lse = of_sums.bad + of_peaks.bad;
    const bool ok = errors.within(bounds) && bad_lse == 0 && differing == 0;
    std::printf(
        "%s %s s%d h%d d%d topk %d of %d%s%s%s%s: max error %.1e, bad %zu/%zu, cosine %.1e, lse "
        "%.1e, bad %zu, reruns differing %d\n",
        ok ? "ok  " : "FAIL", std::is_same_v<T, bf16> ? "bf16" : "f16", x.s_q, x.h_q, x.d_qk,
        x.topk, x.s_kv, h.fillers ? " fillers" : "", h.lengths ? " lengths" : "",
        h.sinks ? " sinks" : "", h.none_valid ? " none" : "", errors.worst, errors.bad, n,
        errors.cosine, std::max(of_sums.worst, of_peaks.worst), bad_lse, differing);
    if (const size_t at = errors.first_bad; errors.bad)
      std::printf("     first bad: row %zu column %zu, got %g, want %g\n", at / 512, at % 512,
                  float(got[at]), want[at]);
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
  GeometricMean speed;
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
      speed.add(peer_us / us);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  if (speed.count)
    std::printf("geometric mean: x%.3f the speed of the peer over %d rows\n", speed.value(),
                speed.count);
  return ok ? 0 : 1;
}
