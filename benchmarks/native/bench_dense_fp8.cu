// Times dense decode over v32 and fp8_row caches without JAX, in a CUDA graph captured by hand, and
// checks it against a naive kernel on the dequantised cache first. See README.md beside this.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "compare.h"
#include "graph_time.cuh"
#include "naive_dense_fp8.cuh"
#include "sm90/dense_decode/launch.h"
#include "sm90/make_schedule/launch.h"

struct Shape {
  std::string label;
  int s_q, h_q;
  std::vector<int> lengths;
  int num_parts = 0, tile_rows = 64;  // 0: chosen
};

struct Hostility {
  bool causal = false;
  int block_size = 64;
  bool bad_ids = false;  // block ids outside the cache
  int spread = 0;        // of scales
  float kv_scale = 0.0009765625f, query_scale = 10;
  bool few = false;  // as a schedule made for few tiles of v32 rows
};

// As default_split chooses (jax_flashmla/_num_parts.py).
void choose_parts(Shape& x) {
  if (x.num_parts > 0) return;
  const int rows = x.s_q * x.h_q, longest = *std::max_element(x.lengths.begin(), x.lengths.end());
  const int small_tiles = (rows + 15) / 16;
  int tiles = (rows + 63) / 64;
  if (small_tiles <= 132 &&
      int64_t(x.lengths.size()) * std::max(1, (longest + 63) / 64) * small_tiles <= 2 * 132) {
    x.tile_rows = 16;
    tiles = small_tiles;
  }
  x.num_parts = std::max(1, 132 / tiles);
}

struct Bench : DeviceArrays {
  uint8_t* pool;
  int64_t pool_bytes;

  // tables: of each call, blocks of its own as far as there are any.
  DenseDecodeParams make(const Shape& x, Format format, const Hostility& h, int64_t num_blocks,
                         int calls, std::vector<const int32_t*>& tables) {
    DenseDecodeParams p{};
    p.b = x.lengths.size(), p.s_q = x.s_q, p.h_q = x.h_q, p.h_kv = 1, p.d_qk = kDqk, p.d_v = kDv;
    p.num_blocks = num_blocks, p.block_size = h.block_size;
    const int longest = *std::max_element(x.lengths.begin(), x.lengths.end());
    p.max_blocks = (std::max(longest, 1) + h.block_size - 1) / h.block_size + 2;
    p.num_parts = x.num_parts, p.tile_rows = x.tile_rows;
    p.dtype = flashmla::DType::kBFloat16, p.format = format, p.row_stride = kDqk;
    p.block_bytes = int64_t{1} * h.block_size * row_bytes(format);
    p.sm_scale = 1 / std::sqrt(576.0f), p.causal = h.causal;
    std::vector<int32_t> ids(num_blocks);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), random);
    const int32_t bad[] = {-1, INT32_MIN, INT32_MAX, int32_t(num_blocks), -123456};
    size_t next = 0;
    for (int call = 0; call < calls; ++call) {
      std::vector<int32_t> table(size_t(p.b) * p.max_blocks, 2147480000);
      for (int i = 0; i < p.b; ++i)
        for (int t = 0; t < (x.lengths[i] + h.block_size - 1) / h.block_size && t < p.max_blocks;
             ++t) {
          int32_t& id = table[size_t(i) * p.max_blocks + t];
          id = ids[next++ % ids.size()];
          if (h.bad_ids && random() % 3 == 0) id = bad[random() % 5];
        }
      tables.push_back(upload(table));
    }
    const size_t rows = size_t(p.b) * p.s_q * p.h_q;
    const size_t slots = size_t(2) * p.num_parts * p.s_q * p.h_q;
    p.q = alloc(rows * kDqk * 2);
    fill_normal<<<256, 256>>>((T*)p.q, rows * kDqk, 99, h.query_scale);
    p.block_table = tables[0], p.cache_seqlens = upload(x.lengths);
    p.kv_scale = upload(std::vector<float>{h.kv_scale});
    p.out = alloc(rows * kDv * 2), p.lse = (float*)alloc(rows * 4);
    p.out_accum = (float*)alloc(slots * kDv * 4), p.lse_accum = (float*)alloc(slots * 4);
    int32_t* cuts = (int32_t*)alloc((p.num_parts + 1) * 8);
    p.cuts = cuts;
    CHECK_STATUS(flashmla::sm90::run_make_schedule({p.b, p.num_parts, p.cache_seqlens, cuts}, 0));
    return p;
  }

  bool check(Shape x, Format format, const Hostility& h) {
    choose_parts(x);
    if (h.few) x.tile_rows = 32;
    int64_t blocks = 3;
    for (int n : x.lengths) blocks += std::max(0, n) / h.block_size + 1;
    std::vector<const int32_t*> tables;
    DenseDecodeParams p = make(x, format, h, blocks, 1, tables);
    // Slots past the lengths stay NaN, as rows are where no sequence uses its block.
    uint8_t* cache = (uint8_t*)alloc(blocks * p.block_bytes);
    fill_rows<<<1024, 128>>>(cache, format, blocks * h.block_size, 3, h.spread);
    p.blocks = cache;
    poison(x, p, cache);
    CHECK_STATUS(flashmla::sm90::run_dense_decode(p, 0));
    CHECK(cudaDeviceSynchronize());
    const size_t rows = size_t(p.b) * p.s_q * p.h_q;
    const int max_tokens = p.max_blocks * p.block_size;
    double* scores = (double*)alloc(rows * max_tokens * 8);
    float *out = (float*)alloc(rows * kDv * 4), *lse = (float*)alloc(rows * 4);
    naive<<<rows, 256>>>(p, scores, max_tokens, out, lse);
    CHECK(cudaDeviceSynchronize());
    const auto got = download<T>(p.out, rows * kDv);
    const auto want = download(out, rows * kDv);
    const int differing = differing_reruns(
        5, got, p.out, [&] { CHECK_STATUS(flashmla::sm90::run_dense_decode(p, 0)); });
    // Of values of about 0.1.
    const float unit =
        format == Format::kFp8Row ? std::max(1.0f, std::abs(h.kv_scale) * 1024) : 1.0f;
    const Bounds bounds{1e-3 * unit, 2.01 / 128, 5e-6};
    Errors errors = errors_of(got, want, bounds);
    if (h.spread) errors.worst = errors.cosine = 0;  // of values of any size
    const Errors of_lse =
        errors_of(download(p.lse, rows), download(lse, rows), {1e-6, 8.01 / 65536});
    const bool ok = errors.within(bounds) && of_lse.bad == 0 && differing == 0;
    std::printf(
        "%s %-8s %-26s block %3d%s%s%s spread %d scale %g: max error %.1e, bad %zu/%zu, cosine "
        "%.1e, "
        "lse %.1e, bad %zu, reruns differing %d\n",
        ok ? "ok  " : "FAIL", format == Format::kV32 ? "v32" : "fp8_row", x.label.c_str(),
        h.block_size, h.causal ? " causal" : "", h.bad_ids ? " bad ids" : "", h.few ? " few" : "",
        h.spread, h.kv_scale, errors.worst, errors.bad, got.size(), errors.cosine, of_lse.worst,
        of_lse.bad, differing);
    if (const size_t at = errors.first_bad; errors.bad)
      std::printf("     first bad: row %zu column %zu, got %g, want %g\n", at / kDv, at % kDv,
                  float(got[at]), want[at]);
    std::fflush(stdout);
    release();
    return ok;
  }

  // Whether a NaN code in the last token of a sequence makes NaN of what attends it, and of nothing
  // else: of two query tokens the first does not.
  bool check_nan_code(Format format, bool few, int code) {
    const int h_q = 64, length = 100, tokens = 3 * 64;
    std::vector<const int32_t*> tables;
    DenseDecodeParams p =
        make({"", 2, h_q, {length}, 1, few ? 32 : 64}, format, {.causal = true}, 3, 1, tables);
    uint8_t* cache = (uint8_t*)alloc(3 * p.block_bytes);
    fill_rows<<<256, 128>>>(cache, format, tokens, 3, 0);
    p.blocks = cache;
    const auto run = [&] {
      CHECK_STATUS(flashmla::sm90::run_dense_decode(p, 0));
      CHECK(cudaDeviceSynchronize());
      return download<T>(p.out, size_t(2) * h_q * kDv);
    };
    const auto before = run();
    std::vector<int32_t> table(p.max_blocks);
    CHECK(cudaMemcpy(table.data(), p.block_table, table.size() * 4, cudaMemcpyDeviceToHost));
    const int64_t row = table[(length - 1) / 64] * 64 + (length - 1) % 64;
    CHECK(cudaMemset(cache + row * row_bytes(format) + code, 0xFF, 1));
    const auto after = run();
    size_t bad = 0;
    for (size_t i = 0; i < before.size(); ++i) {
      const float x = before[i], y = after[i];
      bad += i < before.size() / 2 ? x != y : !std::isnan(y);
    }
    std::printf("%s %-8s NaN code %d%s: bad %zu/%zu\n", bad ? "FAIL" : "ok  ",
                format == Format::kV32 ? "v32" : "fp8_row", code, few ? " few" : "", bad,
                before.size());
    release();
    return bad == 0;
  }

  // NaN in every slot past a sequence's length, in its last block.
  void poison(const Shape& x, const DenseDecodeParams& p, uint8_t* cache) {
    std::vector<int32_t> table(size_t(p.b) * p.max_blocks);
    CHECK(cudaMemcpy(table.data(), p.block_table, table.size() * 4, cudaMemcpyDeviceToHost));
    for (int i = 0; i < p.b; ++i) {
      const int used = x.lengths[i] % p.block_size;
      if (x.lengths[i] <= 0 || used == 0 || x.lengths[i] > p.max_blocks * p.block_size) continue;
      const int32_t id = table[size_t(i) * p.max_blocks + x.lengths[i] / p.block_size];
      if (id < 0 || id >= p.num_blocks) continue;
      const int64_t row = row_bytes(p.format);
      CHECK(cudaMemset(cache + id * p.block_bytes + used * row, 0xFF, (p.block_size - used) * row));
    }
  }

  // Microseconds a call: calls over caches of their own that read 256 MB together.
  double time(Shape x, Format format, bool once) {
    choose_parts(x);
    const int64_t tokens = std::accumulate(x.lengths.begin(), x.lengths.end(), int64_t{0});
    const int calls =
        std::clamp<int64_t>((int64_t{256} << 20) / (tokens * row_bytes(format)) + 1, 2, 128);
    std::vector<const int32_t*> tables;
    DenseDecodeParams p = make(x, format, {}, pool_bytes / (64 * row_bytes(format)), calls, tables);
    p.blocks = pool;
    if (once) CHECK_STATUS(flashmla::sm90::run_dense_decode(p, 0));
    const double us = once ? 0 : time_calls(calls, [&](int call, cudaStream_t stream) {
      p.block_table = tables[call];
      CHECK_STATUS(flashmla::sm90::run_dense_decode(p, stream));
    });
    release();
    return us;
  }
};

bool run_checks(Bench& bench, bool small) {
  bool ok = true;
  std::mt19937 random(3);
  auto ragged = [&](int b, int longest) {
    std::vector<int> v(b);
    for (int& n : v) n = std::uniform_int_distribution<int>(0, longest)(random);
    return v;
  };
  std::vector<int> skewed(40, 200), hostile = {-5, 70, 0, INT32_MIN, 64, 500};
  skewed[20] = 20000;
  const std::vector<Shape> shapes = {
      {"b1 h64 64", 1, 64, {64}},
      {"b1 h16 20", 1, 16, {20}},
      {"b1 h16 1000", 1, 16, {1000}},
      {"b3 h1", 1, 1, {140, 0, 333}},
      {"b2 h32 500", 1, 32, {500, 77}, 4},
      {"b4 h20 ragged", 1, 20, ragged(4, 700), 3},
      {"b2 s3 h9", 3, 9, {2, 300}},
      {"b6 s2 h128 ragged", 2, 128, ragged(6, 900)},
      {"b4 h100 small tiles", 1, 100, {500, 0, 64, 130}, 18, 16},
      {"hostile lengths", 1, 64, hostile, 7},
      {"b40 h64 skewed", 1, 64, skewed},
      {"b40 h16 skewed", 1, 16, skewed},
      {"b130 h64 ragged 200", 1, 64, ragged(130, 200)},
      {"b64 h32 ragged 900", 1, 32, ragged(64, 900)},
      {"b33 h128 1024", 1, 128, std::vector<int>(33, 1024)},
      {"b4 h96 parts", 1, 96, {500, 0, 64, 130}, 18},
      {"b40 h128 skewed", 1, 128, skewed},
      {"h128 hostile lengths", 1, 128, hostile, 7},
      {"b6 s2 h128 tiles of 32", 2, 128, ragged(6, 900), 16, 32},
      {"b4 h100 tiles of 32", 1, 100, {500, 0, 64, 130}, 33, 32},
  };
  // For compute-sanitizer: each tile of rows, cut and uncut, the ring around.
  const std::vector<Shape> few = {
      {"b1 h16 20", 1, 16, {20}},
      {"b1 h16 700 uncut", 1, 16, {700}, 1},
      {"b3 h20 cut", 1, 20, {140, 0, 333}, 4},
      {"b2 h32 uncut", 1, 32, {64, 600}, 1},
      {"b1 h64 500 uncut", 1, 64, {500}, 1},
      {"b2 s3 h9", 3, 9, {2, 300}},
      {"b3 h128 cut", 1, 128, {333, 128, 70}, 3},
      {"b2 h100 small tiles", 1, 100, {190, 64}, 18, 16},
      {"b2 h70 tiles of 32", 1, 70, {190, 64}, 3, 32},
  };
  for (Format format : {Format::kFp8Row, Format::kV32}) {
    if (small) {
      for (const Shape& x : few) {
        ok &= bench.check(x, format, {});
        ok &= bench.check(x, format, {.causal = true, .block_size = 24, .bad_ids = true});
        if (format == Format::kV32 && x.s_q * x.h_q > 32)
          ok &= bench.check(x, format,
                            {.causal = true, .block_size = 24, .bad_ids = true, .few = true});
      }
      continue;
    }
    for (const Shape& x : shapes) {
      ok &= bench.check(x, format, {});
      ok &= bench.check(x, format, {.causal = true, .block_size = 72});
      if (format == Format::kV32 && x.s_q * x.h_q > 32) {
        ok &= bench.check(x, format, {.few = true});
        ok &= bench.check(x, format, {.causal = true, .block_size = 72, .few = true});
      }
    }
    const Shape& some = shapes[5];
    for (int block : {8, 16, 24, 40, 128, 256, 1000})
      ok &= bench.check(some, format, {.causal = true, .block_size = block, .bad_ids = true});
    const Shape pairs{"b3 s2 h128", 2, 128, {700, 90, 65}, 3};
    for (int block : {8, 24, 256}) {
      ok &= bench.check(pairs, format, {.causal = true, .block_size = block, .bad_ids = true});
      if (format == Format::kV32)
        ok &= bench.check(pairs, format,
                          {.causal = true, .block_size = block, .bad_ids = true, .few = true});
    }
    ok &= bench.check(pairs, format, {.kv_scale = -0.001f, .query_scale = 30});
    ok &= bench.check(pairs, format, {.kv_scale = 1e20f, .query_scale = 1e-22f});
    ok &= bench.check(some, format, {.kv_scale = 3e-5f, .query_scale = 1e-4f});
    ok &= bench.check(some, format, {.kv_scale = -0.001f, .query_scale = 30});
    ok &= bench.check(some, format, {.kv_scale = 1e20f, .query_scale = 1e-22f});
  }
  if (small) {  // scales that one factor does not hold
    for (int heads : {16, 64})
      ok &= bench.check({"b2 uncut", 1, heads, {200, 65}, 1}, Format::kV32, {.spread = 100});
    ok &=
        bench.check({"b2 uncut", 1, 64, {200, 65}, 1}, Format::kV32, {.spread = 100, .few = true});
  }
  if (!small) {
    for (bool few : {false, true})
      for (int spread : {6, 100})
        ok &= bench.check({"b4 h64 uncut", 1, 64, {300, 0, 65, 130}, 1}, Format::kV32,
                          {.spread = spread, .few = few});
    ok &= bench.check({"b4 h16 uncut", 1, 16, {300, 0, 65, 130}, 1}, Format::kV32, {.spread = 100});
    // Sequences of a tile each: looked up one by one.
    for (Format format : {Format::kFp8Row, Format::kV32})
      for (int heads : {16, 64})
        ok &= bench.check({"b90 one tile uncut", 1, heads, std::vector<int>(90, 60), 1}, format,
                          {.block_size = 8});
    ok &= bench.check({"b90 one tile uncut", 1, 64, std::vector<int>(90, 60), 1}, Format::kV32,
                      {.block_size = 8, .few = true});
  }
  for (bool few : {false, true})
    for (int code : {0, 300, 511}) ok &= bench.check_nan_code(Format::kV32, few, code);
  std::printf(ok ? "all checks passed\n" : "CHECKS FAILED\n");
  return ok;
}

// Arguments: the file of rows, or `small` for some checks; `time` to leave the checks out, or
// `once` to make each call but once, for a profiler; GiB of the pool that rows are read from, 8 by
// default.
int main(int argc, char** argv) {
  Bench bench;
  const std::string rows = argc > 1 ? argv[1] : "", mode = argc > 2 ? argv[2] : "";
  const bool once = mode == "once", small = rows == "small";
  const bool ok = once || mode == "time" || run_checks(bench, small);
  if (rows.empty() || small) return ok ? 0 : 1;
  bench.pool_bytes = int64_t{argc > 3 ? std::atoi(argv[3]) : 8} << 30;
  CHECK(cudaMalloc(&bench.pool, bench.pool_bytes));
  std::ifstream file(rows);
  std::string line, filled;
  std::map<std::string, GeometricMean> speeds;
  while (std::getline(file, line)) {
    std::istringstream in(line);
    std::string format;
    int b, s_q, h_q, s_k, num_parts, tile_rows;
    double peer = 0;
    in >> format >> b >> s_q >> h_q >> s_k >> num_parts >> tile_rows >> peer;
    const Format f = format == "v32"       ? Format::kV32
                     : format == "fp8_row" ? Format::kFp8Row
                                           : Format::kDense;
    if (filled != format) {
      fill_rows<<<4096, 128>>>(bench.pool, f, bench.pool_bytes / row_bytes(f), 1, 0);
      CHECK(cudaDeviceSynchronize());
      filled = format;
    }
    const double us =
        bench.time({"", s_q, h_q, std::vector<int>(b, s_k), num_parts, tile_rows}, f, once);
    const double bytes = double(b) * s_k * row_bytes(f);
    std::printf("%-8s b %3d s_q %d h_q %3d s_k %6d: %8.2f us  %6.0f GB/s %6.1f TFLOP/s",
                format.c_str(), b, s_q, h_q, s_k, us, bytes / us * 1e-3,
                2.0 * b * s_k * s_q * h_q * (kDqk + kDv) / us * 1e-6);
    if (peer > 0) {
      std::printf("  peer %8.2f x%.3f", peer, peer / us);
      speeds[format].add(peer / us);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  for (const auto& [format, speed] : speeds)
    std::printf("%s: x%.3f the peer's speed in geometric mean over %d rows\n", format.c_str(),
                speed.value(), speed.count);
  return ok ? 0 : 1;
}
