// Times the Hopper sparse decode kernel without JAX, in a CUDA graph captured by hand, and checks
// it against a naive kernel on the dequantised cache first. See README.md beside this.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "compare.h"
#include "graph_time.cuh"
#include "naive_sparse_decode.cuh"
#include "sm90/make_schedule/launch.h"
#include "sm90/sparse_decode/launch.h"

struct Shape {
  std::string label;
  int b, s_q, h_q, topk;
  int num_parts = 0;  // 0: chosen
  double peer_us = 0, limit_us = 0;
  Format format = Format::kV32;
  int d_qk = 576, extra_topk = 0;

  Format extra_format() const { return format == Format::kV41 ? Format::kV41Fp4 : format; }
  int64_t row_bytes() const {
    return format == Format::kDense ? d_qk * 2 : flashmla::bytes_per_token(format);
  }
  int tiles() const { return b * s_q * ((topk + 63) / 64 + (extra_topk + 63) / 64); }
};

// A row file's names. Of v41 the extra cache is v41_fp4, of others as the main one.
bool find_format(const std::string& name, Shape* x) {
  const struct {
    const char* name;
    Format format;
    int d_qk;
  } formats[] = {{"v32", Format::kV32, 576},        {"v32_nope", Format::kV32Nope, 512},
                 {"v4", Format::kV4, 512},          {"v41", Format::kV41, 512},
                 {"fp8_row", Format::kFp8Row, 576}, {"dense_576", Format::kDense, 576},
                 {"dense_512", Format::kDense, 512}};
  for (const auto& f : formats)
    if (name == f.name) return x->format = f.format, x->d_qk = f.d_qk, true;
  return false;
}

struct Hostility {
  int block_size = 64;
  bool fillers = false;  // indices outside the layer
  bool lengths = false;  // topk_length
  bool sinks = false;
  bool layer = false;  // not the array's first blocks
  int spread = 0;      // of scales
  bool none_valid = false;
};

// Parts for which the launch takes tiles of 16 heads where the problem is small; else as many as
// fill the multiprocessors with tiles of 64, but no more than there are tiles.
int choose_parts(const Shape& x) {
  if (x.num_parts > 0) return x.num_parts;
  const auto tiles = [&](int rows) { return (x.h_q + rows - 1) / rows; };
  const bool has_small = x.format == Format::kV32 && x.extra_topk == 0;
  const bool few = has_small && x.tiles() * tiles(16) <= 2 * 132;
  return std::max(1, std::min(132 / tiles(few ? 16 : 64), few ? 132 : x.tiles()));
}

struct Bench : DeviceArrays {
  uint8_t* pool;
  int64_t pool_bytes;

  // lengths: tiles' worth of tokens of each query token.
  SparseDecodeParams make(const Shape& x, const std::vector<int>& lengths, float query_scale) {
    SparseDecodeParams p{};
    p.b = x.b, p.s_q = x.s_q, p.h_q = x.h_q, p.d_qk = x.d_qk, p.d_v = kDv;
    p.num_parts = choose_parts(x), p.dtype = flashmla::DType::kBFloat16;
    p.sm_scale = 1 / std::sqrt(576.0f);
    const size_t rows = size_t(x.b) * x.s_q * x.h_q, slots = size_t(2) * p.num_parts * x.h_q;
    p.q = alloc(rows * x.d_qk * 2);
    fill_normal<<<256, 256>>>((T*)p.q, rows * x.d_qk, 99, query_scale);
    p.out = alloc(rows * kDv * 2), p.lse = (float*)alloc(rows * 4);
    p.out_accum = (float*)alloc(slots * kDv * 4), p.lse_accum = (float*)alloc(slots * 4);
    if (x.format == Format::kFp8Row) p.kv_scale = upload(std::vector<float>{0.75f});
    int32_t* cuts = (int32_t*)alloc((p.num_parts + 1) * 8);
    p.cuts = cuts;
    CHECK_STATUS(
        flashmla::sm90::run_make_schedule({x.b * x.s_q, p.num_parts, upload(lengths), cuts}, 0));
    return p;
  }

  static SparseSource source_of(const Shape& x, Format format, int topk, int block_size) {
    SparseSource m{};
    m.format = format, m.topk = topk, m.block_size = block_size;
    m.row_stride = format == Format::kDense ? x.d_qk : 0;
    m.block_bytes = format == Format::kDense ? int64_t{block_size} * x.d_qk * 2
                                             : flashmla::bytes_per_block(format, block_size);
    return m;
  }

  // A cache of which every other slot is NaN and not named. lengths: adds each query token's tiles.
  SparseSource make_source(const Shape& x, const Hostility& h, Format format, int topk,
                           int block_size, std::vector<int>* lengths) {
    SparseSource m = source_of(x, format, topk, block_size);
    const int n = x.b * x.s_q;
    std::vector<int> given(n, topk);
    if (h.lengths)
      for (int& l : given) l = uniform(0, 3) ? uniform(-3, topk + 3) : uniform(0, 1) * 65;
    const int64_t first = h.layer ? 5 : 0;
    m.layer_blocks = std::max(3, 4 * topk / block_size);
    m.num_blocks = m.layer_blocks + (h.layer ? 9 : 0);
    m.blocks = alloc(m.num_blocks * m.block_bytes);
    if (h.layer) m.first_block = upload(std::vector<int32_t>{int32_t(first)});
    const int64_t layer_rows = m.layer_blocks * block_size;
    std::vector<int64_t> used;
    for (int64_t i = 0; i < layer_rows; i += 2) used.push_back(i + first * block_size);
    fill_rows<<<1024, 128>>>(m, x.d_qk, upload(used), used.size(), 3, h.spread);
    const int32_t fillers[] = {-1,
                               INT32_MIN,
                               -123456,
                               int32_t(layer_rows),
                               INT32_MAX,
                               2147480000,
                               int32_t(layer_rows) + 77};
    std::vector<int32_t> indices(size_t(n) * topk);
    for (int i = 0; i < n; ++i) {
      const int length = std::min(std::max(given[i], 0), topk);
      (*lengths)[i] += (length + 63) / 64 * 64;
      for (int t = 0; t < topk; ++t) {
        int32_t& index = indices[size_t(i) * topk + t];
        index = uniform(0, int(used.size()) - 1) * 2;
        if (t >= length) index = uniform(0, 1) ? index + 1 : fillers[uniform(0, 6)];
        if (h.none_valid || (h.fillers && uniform(0, 2) == 0)) index = fillers[uniform(0, 6)];
      }
    }
    m.indices = upload(indices);
    if (h.lengths) m.topk_length = upload(given);
    return m;
  }

  bool check(const Shape& x, const Hostility& h, float query_scale = 10) {
    std::vector<int> lengths(x.b * x.s_q);
    const SparseSource main = make_source(x, h, x.format, x.topk, h.block_size, &lengths);
    SparseSource extra{};
    if (x.extra_topk > 0)
      extra = make_source(x, h, x.extra_format(), x.extra_topk, h.block_size / 2 + 1, &lengths);
    SparseDecodeParams p = make(x, lengths, query_scale);
    p.main = main, p.extra = extra;
    if (h.sinks) {
      std::vector<float> sinks(x.h_q);
      for (float& s : sinks) {
        const int kind = uniform(0, 2);
        s = kind == 0 ? INFINITY : kind == 1 ? -INFINITY : 0.1f * uniform(-20, 100);
      }
      p.attn_sink = upload(sinks);
    }
    return compare(x, h, p);
  }

  bool compare(const Shape& x, const Hostility& h, const SparseDecodeParams& p) {
    CHECK_STATUS(flashmla::sm90::run_sparse_decode(p, 0));
    CHECK(cudaDeviceSynchronize());
    const size_t rows = size_t(p.b) * p.s_q * p.h_q;
    double* scores = (double*)alloc(rows * (x.topk + x.extra_topk) * 8);
    float *out = (float*)alloc(rows * kDv * 4), *lse = (float*)alloc(rows * 4);
    naive<<<rows, 256>>>(p, scores, out, lse);
    CHECK(cudaDeviceSynchronize());
    const auto got = download<T>(p.out, rows * kDv);
    const auto want = download(out, rows * kDv);
    const int differing = differing_reruns(
        5, got, p.out, [&] { CHECK_STATUS(flashmla::sm90::run_sparse_decode(p, 0)); });
    const Bounds bounds{1e-3, 2.01 / 128, 5e-6};
    Errors errors = errors_of(got, want, bounds);
    if (h.spread) errors.worst = errors.cosine = 0;  // of values of any size
    const Errors of_lse =
        errors_of(download(p.lse, rows), download(lse, rows), {1e-6, 8.01 / 65536});
    const bool ok = errors.within(bounds) && of_lse.bad == 0 && differing == 0;
    std::printf(
        "%s %-26s block %3d%s%s%s%s%s spread %d: max error %.1e, bad %zu/%zu, cosine %.1e, "
        "lse %.1e, bad %zu, reruns differing %d\n",
        ok ? "ok  " : "FAIL", x.label.c_str(), h.block_size, h.fillers ? " fillers" : "",
        h.lengths ? " lengths" : "", h.sinks ? " sinks" : "", h.layer ? " layer" : "",
        h.none_valid ? " none" : "", h.spread, errors.worst, errors.bad, got.size(), errors.cosine,
        of_lse.worst, of_lse.bad, differing);
    if (const size_t at = errors.first_bad; errors.bad)
      std::printf("     first bad: row %zu column %zu, got %g, want %g\n", at / kDv, at % kDv,
                  float(got[at]), want[at]);
    std::fflush(stdout);
    release();
    return ok;
  }

  void fill_pool(const Shape& x) {
    SparseSource m = source_of(x, x.format, 0, 64);
    m.blocks = pool;
    fill_rows<<<4096, 128>>>(m, x.d_qk, nullptr, pool_bytes / m.block_bytes * 64, 1, 0);
    CHECK(cudaDeviceSynchronize());
  }

  // Microseconds a call: calls in a graph, over indices of their own, that read 256 MB together.
  double time(const Shape& x) {
    const int64_t n = x.b * x.s_q, rows = n * (x.topk + x.extra_topk);
    const int calls =
        std::clamp<int64_t>((int64_t{256} << 20) / (rows * x.row_bytes()) + 1, 2, 128);
    SparseDecodeParams p = make(x, std::vector<int>(n, x.tiles() / n * 64), 10);
    p.main = source_of(x, x.format, x.topk, 64);
    p.main.num_blocks = p.main.layer_blocks = pool_bytes / p.main.block_bytes;
    p.main.blocks = pool;
    p.extra = p.main, p.extra.topk = x.extra_topk;
    if (x.extra_topk == 0) p.extra = {};
    std::vector<const int32_t*> indices;
    for (int call = 0; call < calls; ++call) {
      std::vector<int32_t> v(rows);
      for (int32_t& i : v) i = random() % (p.main.num_blocks * 64);
      indices.push_back(upload(v));
    }
    const double us = time_calls(calls, [&](int call, cudaStream_t stream) {
      p.main.indices = indices[call], p.extra.indices = indices[call] + n * x.topk;
      CHECK_STATUS(flashmla::sm90::run_sparse_decode(p, stream));
    });
    release();
    return us;
  }
};

// Tiles of 64 heads, for each way in which their rows come: more tiles than are on their way at
// once, whole query tokens and shares.
bool run_tile_checks(Bench& bench, const Hostility& all) {
  bool ok = true;
  for (const char* name : {"v32", "v32_nope", "v4", "dense_576"})
    for (int parts : {1, 3}) {
      Shape x{std::string(name) + " b3 h64 topk 300", 3, 1, 64, 300, parts};
      find_format(name, &x);
      if (x.format == Format::kV4) x.extra_topk = 130;
      ok &= bench.check(x, all);
    }
  return ok;
}

bool run_checks(Bench& bench, bool small) {
  bool ok = true;
  const Hostility plain{}, all{61, true, true, true, true, 0, false};
  ok &= bench.check({"b1 h64 topk 64", 1, 1, 64, 64}, plain);
  ok &= bench.check({"b2 h64 topk 300", 2, 1, 64, 300, 3}, all);
  ok &= bench.check({"b3 h20 topk 65", 3, 1, 20, 65}, all);
  Shape pair{"v4 b2 h128 topk 130 and 65", 2, 1, 128, 130};
  find_format("v4", &pair), pair.extra_topk = 65;
  ok &= bench.check(pair, all);
  if (small) return ok & run_tile_checks(bench, all);
  for (int h_q : {1, 8, 16, 20, 32, 64, 96, 128}) {
    const std::string h = " h" + std::to_string(h_q);
    ok &= bench.check({"b4 s3" + h + " topk 576", 4, 3, h_q, 576}, all);
    ok &= bench.check({"b2 s1" + h + " topk 2048", 2, 1, h_q, 2048}, {2, true, false, false});
    ok &= bench.check({"b74 s1" + h + " topk 200", 74, 1, h_q, 200}, {576, true, true, false});
    ok &= bench.check({"b74 s1" + h + " topk 512", 74, 1, h_q, 512}, plain);
  }
  for (int h_q : {16, 32, 64, 128}) {
    ok &= bench.check({"whole, sinks h" + std::to_string(h_q), 20, 1, h_q, 300, 1}, all);
    ok &= bench.check({"64 rows h" + std::to_string(h_q), 5, 1, h_q, 300, 100}, {53, true, true});
    ok &= bench.check({"none h" + std::to_string(h_q), 3, 1, h_q, 128},
                      {64, false, false, false, false, 0, true});
    for (int spread : {8, 100})
      for (int topk : {1, 64, 500})
        ok &= bench.check({"scales h" + std::to_string(h_q) + " topk " + std::to_string(topk), 3, 1,
                           h_q, topk, spread == 100 ? 1 : 0},
                          {64, true, false, false, false, spread}, 1);
  }
  for (const char* name : {"v32", "v32_nope", "v4", "v41", "fp8_row", "dense_576", "dense_512"})
    for (int h_q : {16, 64, 128, 192})
      for (int extra : {0, 130}) {
        Shape x{std::string(name) + " h" + std::to_string(h_q), 40, 1, h_q, 300};
        find_format(name, &x);
        if (extra > 0 && (x.format == Format::kV32Nope || x.format == Format::kFp8Row)) continue;
        if (extra > 0 && x.format == Format::kV32) continue;
        x.extra_topk = extra;
        ok &= bench.check(x, all);
        x.b = 5, x.num_parts = 1;
        ok &= bench.check(x, {64, true, false, false, false, x.format == Format::kV4 ? 8 : 0});
      }
  ok &= bench.check({"b321 h64 topk 64", 321, 1, 64, 64}, all);
  ok &= bench.check({"b321 s3 h128 topk 64", 321, 3, 128, 64}, {69, true, true});
  return ok & run_tile_checks(bench, all);
}

int main(int argc, char** argv) {
  const std::string rows_path = argc > 1 ? argv[1] : "";
  Bench bench;
  const bool small = rows_path == "small";
  bool ok = true;
  if (argc <= 2 || std::strcmp(argv[2], "time") != 0) ok = run_checks(bench, small);
  if (!ok) std::printf("CHECKS FAILED\n");
  if (rows_path.empty() || small) return ok ? 0 : 1;
  bench.pool_bytes = int64_t{8528} << 20;
  CHECK(cudaMalloc(&bench.pool, bench.pool_bytes));

  std::ifstream file(rows_path);
  std::string line;
  GeometricMean of_limit, speed;
  std::string filled;
  while (std::getline(file, line)) {
    std::istringstream in(line);
    Shape x;
    in >> x.label >> x.b >> x.s_q >> x.h_q >> x.topk >> x.num_parts >> x.peer_us >> x.limit_us;
    std::string format = "v32";
    in >> format >> x.extra_topk;
    if (in.fail()) x.extra_topk = 0;
    if (!find_format(format, &x)) return std::printf("no format %s\n", format.c_str()), 1;
    if (format != filled) bench.fill_pool(x), filled = format;
    const double us = bench.time(x), rows = double(x.b) * x.s_q * (x.topk + x.extra_topk);
    std::printf("%-26s %8.2f us  limit %7.2f x%.2f  %6.1f TFLOP/s %7.1f GB/s", x.label.c_str(), us,
                x.limit_us, us / x.limit_us, rows * x.h_q * 2 * (x.d_qk + kDv) / us * 1e-6,
                rows * x.row_bytes() / us * 1e-3);
    if (x.limit_us > 0) of_limit.add(us / x.limit_us);
    if (x.peer_us > 0) {
      std::printf("  peer %8.2f, speed x%.3f", x.peer_us, x.peer_us / us);
      speed.add(x.peer_us / us);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  if (of_limit.count)
    std::printf("geometric mean: %.3f of the limit's time over %d rows\n", of_limit.value(),
                of_limit.count);
  if (speed.count)
    std::printf("geometric mean: x%.3f the speed of the peer over %d rows\n", speed.value(),
                speed.count);
  return ok ? 0 : 1;
}
