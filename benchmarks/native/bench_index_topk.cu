// Checks the Hopper indexer against a naive one, and its selection against a sort, then times it
// without JAX, in a CUDA graph captured by hand. See README.md beside this.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "compare.h"
#include "graph_time.cuh"
#include "naive_index_scores.cuh"
#include "sm90/index_scores/launch.h"
#include "sm90/index_topk/launch.h"
#include "sm90/make_schedule/launch.h"

using flashmla::IndexScoresParams;
using flashmla::IndexTopkParams;

struct Case {
  int heads, s_q;
  std::vector<int> lengths;
  int topk, max_blocks;
  bool causal = true, fp8 = true, hostile = true;
  int num_parts = 132;
};

// What scores may be like.
enum Values { kNormal, kEqual, kFew, kSpecial, kNarrow, kValueKinds };

struct Bench : DeviceArrays {
  uint8_t* pool = nullptr;
  int64_t pool_blocks = 0;
  int64_t spread = 100003;  // blocks of the pool from a sequence's block to its next
  int failures = 0, checks = 0;

  int32_t* make_cuts(const std::vector<int>& lengths, int num_parts) {
    auto* cuts = (int32_t*)alloc((num_parts + 1) * 8);
    const int b = lengths.size();
    CHECK_STATUS(flashmla::sm90::run_make_schedule({b, num_parts, upload(lengths), cuts}, 0));
    return cuts;
  }

  void report(bool ok, const std::string& text) {
    ++checks;
    if (!ok) ++failures;
    if (!ok || checks % 20 == 1) std::printf("%s %s\n", ok ? "ok  " : "FAIL", text.c_str());
    std::fflush(stdout);
  }

  std::string describe(const Case& x) {
    char text[200];
    std::snprintf(
        text, sizeof text, "b %zu s_q %d heads %d topk %d first length %d blocks %d parts %d%s%s%s",
        x.lengths.size(), x.s_q, x.heads, x.topk, x.lengths[0], x.max_blocks, x.num_parts,
        x.causal ? " causal" : "", x.fp8 ? " e4m3" : " bf16", x.hostile ? " hostile" : "");
    return text;
  }

  IndexScoresParams make(const Case& x) {
    const int b = x.lengths.size();
    IndexScoresParams p{.b = b, .s_q = x.s_q, .heads = x.heads, .num_parts = x.num_parts};
    p.causal = x.causal, p.fp8_queries = x.fp8;
    const int64_t layer_blocks = int64_t{b} * x.max_blocks + 3, first = x.hostile ? 5 : 0;
    auto& k = p.keys;
    k.num_blocks = layer_blocks + (x.hostile ? 9 : 0), k.layer_blocks = layer_blocks;
    k.block_bytes = kBlockBytes, k.max_blocks = x.max_blocks;
    k.first_block = upload(std::vector<int32_t>{int32_t(first)});
    std::vector<int32_t> table(size_t(b) * x.max_blocks), order(layer_blocks), used, lengths;
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    const int32_t fillers[] = {-1, INT32_MIN, int32_t(layer_blocks), INT32_MAX, 2147480000};
    for (int i = 0; i < b; ++i) {
      int length = x.lengths[i];
      if (x.hostile && length == 0) length = uniform(0, 1) ? -5 : INT32_MIN;
      lengths.push_back(length);
      for (int j = 0; j < x.max_blocks; ++j) {
        const size_t at = size_t(i) * x.max_blocks + j;
        const bool holds = j * 64 < std::min(length, x.max_blocks * 64);
        const bool filler = !holds || (x.hostile && uniform(0, 9) == 0);
        table[at] = filler ? fillers[uniform(0, 4)] : order[at];
        if (!filler) used.push_back(order[at] + first);
      }
    }
    k.block_table = upload(table), k.cache_seqlens = upload(lengths);
    k.blocks = alloc(k.num_blocks * k.block_bytes);
    if (!used.empty())
      fill_keys<<<1024, 128>>>((uint8_t*)k.blocks, upload(used), used.size(), 3, x.hostile);
    const int64_t rows = int64_t{b} * x.s_q * x.heads;
    void* q = alloc(rows * 128 * (x.fp8 ? 1 : 2));
    if (x.fp8)
      fill_e4m3<<<256, 256>>>((uint8_t*)q, rows * 128, 99, 60);
    else
      fill_bf16<<<256, 256>>>((__nv_bfloat16*)q, rows * 128, 99, 60);
    p.q = q;
    auto* weights = (float*)alloc(rows * 4);
    fill_floats<<<256, 256>>>(weights, rows, 11, 0.3f, 1);
    p.weights = weights;
    p.cuts = make_cuts(lengths, x.num_parts);
    return p;
  }

  IndexTopkParams make_topk(const IndexScoresParams& p, int topk, const float* scores) {
    IndexTopkParams t{.b = p.b, .s_q = p.s_q, .heads = scores ? 0 : p.heads, .topk = topk};
    t.num_parts = p.num_parts, t.causal = p.causal, t.fp8_queries = p.fp8_queries;
    t.keys = p.keys, t.q = p.q, t.weights = p.weights, t.scores = scores, t.cuts = p.cuts;
    t.indices = (int32_t*)alloc(int64_t{p.b} * p.s_q * topk * 4);
    t.positions = (int32_t*)alloc(int64_t{p.b} * p.s_q * topk * 4);
    t.workspace = alloc(index_topk_workspace_bytes(t));
    return t;
  }

  // Runs a selection twice and compares it with one of `scores`.
  bool check_selection(const IndexTopkParams& t, const std::vector<float>& scores) {
    const int64_t rows = int64_t{t.b} * t.s_q, tokens = int64_t{t.keys.max_blocks} * 64;
    const auto table = download(t.keys.block_table, int64_t{t.b} * t.keys.max_blocks);
    const auto lengths = download(t.keys.cache_seqlens, t.b);
    bool ok = true;
    for (int rerun = 0; rerun < 2; ++rerun) {
      CHECK(cudaMemset(t.indices, 0x77, rows * t.topk * 4));
      CHECK_STATUS(flashmla::sm90::run_index_topk(t, 0));
      CHECK(cudaDeviceSynchronize());
      const auto indices = download(t.indices, rows * t.topk);
      const auto positions = download(t.positions, rows * t.topk);
      for (int64_t row = 0; row < rows && ok; ++row) {
        const int64_t i = row / t.s_q;
        int64_t seen = std::clamp<int64_t>(lengths[i], 0, tokens);
        if (t.causal) seen = std::max<int64_t>(seen - (t.s_q - 1 - row % t.s_q), 0);
        std::vector<float> visible(scores.begin() + row * tokens,
                                   scores.begin() + row * tokens + seen);
        for (int64_t s = 0; s < seen; ++s) {
          const int32_t id = table[i * t.keys.max_blocks + s / 64];
          if (id < 0 || id >= t.keys.layer_blocks) visible[s] = -INFINITY;
        }
        const auto want = select(visible.data(), seen, t.topk);
        for (size_t k = 0; k < size_t(t.topk) && ok; ++k) {
          const int position = k < want.size() ? want[k] : -1;
          const int slot =
              position < 0 ? -1 : table[i * t.keys.max_blocks + position / 64] * 64 + position % 64;
          const size_t at = row * t.topk + k;
          ok = positions[at] == position && indices[at] == slot;
          if (!ok)
            std::printf("     row %ld place %zu of %zu: got position %d, slot %d, want %d, %d\n",
                        long(row), k, want.size(), positions[at], indices[at], position, slot);
        }
      }
    }
    return ok;
  }

  void check(const Case& x) {
    IndexScoresParams p = make(x);
    const int64_t count = int64_t{p.b} * p.s_q * x.max_blocks * 64;
    p.scores = (float*)alloc(count * 4);
    float *want = (float*)alloc(count * 4), *magnitude = (float*)alloc(count * 4);
    naive_scores<<<(count + 127) / 128, 128>>>(p, want, magnitude);
    CHECK_STATUS(flashmla::sm90::run_index_scores(p, 0));
    CHECK(cudaDeviceSynchronize());
    const auto got = download(p.scores, count), expected = download(want, count);
    const auto scale = download(magnitude, count);
    // QGMMA adds with about 14 bits.
    const double bound = x.fp8 ? 1e-3 : 1e-5;
    double worst = 0, dot = 0, squares = 0;
    int64_t bad = 0, first_bad = -1;
    for (int64_t i = 0; i < count; ++i) {
      const double a = got[i], e = expected[i];
      bool same = std::isnan(a) && std::isnan(e);
      if (!std::isfinite(e)) {
        same |= a == e;
      } else {
        const double error = std::abs(a - e);
        same = error <= bound * scale[i];
        if (scale[i] > 0) worst = std::max(worst, error / scale[i]);
        dot += a * e, squares += a * a + e * e;
      }
      if (!same && ++bad == 1) first_bad = i;
    }
    const int differing = differing_reruns(
        2, got, p.scores, [&] { CHECK_STATUS(flashmla::sm90::run_index_scores(p, 0)); });
    const double cosine = squares > 0 ? 1 - 2 * dot / squares : 0;
    char text[300];
    std::snprintf(text, sizeof text,
                  "scores %s: error %.1e of magnitude, 1 - cos %.1e, bad %ld/%ld%s",
                  describe(x).c_str(), worst, cosine, long(bad), long(count),
                  differing ? ", reruns differ" : "");
    report(bad == 0 && differing == 0 && cosine < 5e-6, text);
    if (bad) {
      std::printf("     first bad: row %ld token %ld, got %g, want %g\n",
                  long(first_bad / (x.max_blocks * 64)), long(first_bad % (x.max_blocks * 64)),
                  got[first_bad], expected[first_bad]);
    }
    report(check_selection(make_topk(p, x.topk, nullptr), got), "topk of   " + describe(x));
    report(check_selection(make_topk(p, x.topk, p.scores), got), "selection " + describe(x));
    release();
  }

  void check_given(const Case& x, Values values) {
    IndexScoresParams p = make(x);
    p.keys.blocks = nullptr;
    const float special[] = {NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-42f, -1e-42f, -1e38f};
    std::vector<float> scores(int64_t{p.b} * p.s_q * x.max_blocks * 64);
    for (float& s : scores) {
      const float z = std::normal_distribution<float>()(random);
      switch (values) {
        case kNormal:
          s = z;
          break;
        case kEqual:
          s = -3.5f;
          break;
        case kFew:
          s = float(uniform(-2, 2));
          break;
        case kSpecial:
          s = special[uniform(0, 8)];
          break;
        default:
          s = 1 + z * 1e-6f;  // the highest digits are equal
      }
    }
    const auto t = make_topk(p, x.topk, upload(scores));
    report(check_selection(t, scores), "given " + std::to_string(int(values)) + " " + describe(x));
    release();
  }

  // op: scores, shared (scores, all calls' into one array), topk (from keys) or select (from
  // scores).
  double time(const std::string& op, int heads, int b, int s_q, int s_k, int topk) {
    const bool given = op == "select";
    const int max_blocks = (s_k + 63) / 64;
    const int64_t tokens = int64_t{b} * max_blocks * 64;
    const int64_t bytes = given ? tokens * s_q * 4 : tokens * 132;
    const int calls = std::clamp<int64_t>((int64_t{256} << 20) / bytes + 1, 2, 128);
    IndexScoresParams p{.b = b, .s_q = s_q, .heads = heads, .num_parts = 132};
    p.causal = p.fp8_queries = true;
    auto& k = p.keys;
    k.num_blocks = k.layer_blocks = pool_blocks;
    k.block_bytes = kBlockBytes, k.max_blocks = max_blocks, k.blocks = pool;
    const std::vector<int> lengths(b, s_k);
    k.cache_seqlens = upload(lengths), p.cuts = make_cuts(lengths, 132);
    const int64_t rows = int64_t{b} * s_q * heads;
    p.q = alloc(rows * 128), p.weights = (float*)alloc(rows * 4);
    fill_e4m3<<<256, 256>>>((uint8_t*)p.q, rows * 128, 99, 60);
    fill_floats<<<256, 256>>>((float*)p.weights, rows, 11, 0.3f, 1);
    std::vector<const int32_t*> tables;
    std::vector<float*> scores;
    for (int call = 0; call < calls; ++call) {
      std::vector<int32_t> table(size_t(b) * max_blocks);
      for (size_t i = 0; i < table.size(); ++i)  // distinct within the pool
        table[i] = (call * table.size() + i) * spread % pool_blocks;
      tables.push_back(upload(table));
      const bool shared =
          call > 0 && !given && (op == "shared" || tokens * s_q * calls > int64_t{1} << 29);
      scores.push_back(op == "topk" ? nullptr
                       : shared     ? scores[0]
                                    : (float*)alloc(tokens * s_q * 4));
      if (given) fill_floats<<<1024, 256>>>(scores[call], tokens * s_q, call, 0, 1);
    }
    const auto t = make_topk(p, topk, given ? scores[0] : nullptr);
    CHECK(cudaDeviceSynchronize());
    const double us = time_calls(calls, [&](int call, cudaStream_t stream) {
      if (op == "scores" || op == "shared") {
        IndexScoresParams mine = p;
        mine.keys.block_table = tables[call], mine.scores = scores[call];
        CHECK_STATUS(flashmla::sm90::run_index_scores(mine, stream));
      } else {
        IndexTopkParams mine = t;
        mine.keys.block_table = tables[call], mine.scores = scores[call];
        CHECK_STATUS(flashmla::sm90::run_index_topk(mine, stream));
      }
    });
    release();
    return us;
  }
};

// For compute-sanitizer: each kernel's ways, with few tokens.
void run_small_checks(Bench& bench) {
  bench.check({64, 1, {200}, 7, 4});                                 // N = 64, a block for a part
  bench.check({20, 2, {65, 0, 1300}, 64, 21, true, true, true, 3});  // rings go round
  bench.check({32, 4, {300, 64}, 64, 6, true, true, true, 2});       // N = 128
  bench.check({64, 3, {65, 0, 700}, 64, 12, true, true, true, 2});   // N = 256, one loading warp
  bench.check({32, 7, {330}, 64, 6, true, true, true, 1});
  bench.check({64, 9, {130}, 64, 3});  // chunks
  bench.check({64, 3, {65, 0, 300}, 64, 6, true, false});
  bench.check({32, 1, {9000}, 64, 141});  // two blocks select
  bench.check_given({1, 1, {3000, 70}, 512, 50}, kFew);
  bench.check_given({1, 1, {4000}, 100, 63}, kNormal);
  bench.check_given({1, 1, {33000}, 100, 516}, kNormal);  // eight blocks
  bench.check_given({1, 1, {9000}, 100, 141}, kEqual);    // more candidates than there is room for
  bench.check_given({1, 1, std::vector<int>(67, 8200), 20, 129}, kNarrow);  // each by one block
}

void run_checks(Bench& bench) {
  const std::vector<int> ragged{4097, 0, 1, 63, 64, 65, 1000, 2500};
  for (int heads : {1, 20, 32, 64}) {
    for (int s_q = 1; s_q <= 8; ++s_q) {
      const int topk = std::vector<int>{1, 7, 512, 2048, 4096}[(heads + s_q) % 5];
      bench.check({heads, s_q, ragged, topk, 70, s_q % 3 > 0, true, s_q % 2 > 0});
    }
    for (int s_q : {1, 2, 3, 4, 7}) bench.check({heads, s_q, ragged, 512, 66, true, false});
    for (int parts : {1, 7, 256}) bench.check({heads, 2, ragged, 100, 80, true, true, true, parts});
  }
  bench.check({64, 1, {20000}, 2048, 320});
  bench.check({32, 1, {20000}, 2048, 1000, true, true, false});
  bench.check({64, 70, {1000, 40, 129}, 64, 20});
  bench.check({32, 70, {1000, 0, 129}, 64, 20, false, true, true, 8});
  bench.check({64, 33, {300, 33}, 64, 20, true, false});
  bench.check({64, 300, {2000}, 512, 1024});  // in two turns of the workspace
  for (int v = 0; v < kValueKinds; ++v) {
    const auto values = static_cast<Values>(v);
    for (int topk : {1, 7, 512, 2048, 4096}) {
      bench.check_given({1, 1, {8000, 2049, 2048, 100, 0, 1}, topk, 128}, values);
      bench.check_given({1, 1, {100000}, topk, 2048}, values);
    }
    bench.check_given({1, 3, {5000, 4000}, 2048, 80, true, true, false}, values);
    bench.check_given({1, 1, std::vector<int>(64, 30000), 2048, 512}, values);
    bench.check_given({1, 1, std::vector<int>(300, 4096), 2048, 64}, values);
    bench.check_given({1, 1, {1000000}, 2048, 16384}, values);  // past what blocks keep
  }
}

int main(int argc, char** argv) {
  const std::string rows_path = argc > 1 ? argv[1] : "";
  const bool small = rows_path == "small";
  Bench bench;
  if (argc <= 2 || std::strcmp(argv[2], "time") != 0) {
    const auto start = std::chrono::steady_clock::now();
    run_small_checks(bench);
    if (!small) run_checks(bench);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%d of %d checks failed, %.1f s\n", bench.failures, bench.checks, seconds.count());
  }
  if (rows_path.empty() || small) return bench.failures ? 1 : 0;
  if (argc > 3) bench.spread = std::atoll(argv[3]);
  bench.pool_blocks = 600011;  // 5 GB
  CHECK(cudaMalloc(&bench.pool, bench.pool_blocks * kBlockBytes));
  fill_keys<<<8192, 128>>>(bench.pool, nullptr, bench.pool_blocks, 1, false);
  CHECK(cudaDeviceSynchronize());

  std::ifstream file(rows_path);
  std::string line;
  GeometricMean speed;
  while (std::getline(file, line)) {
    std::istringstream in(line);
    std::string op;
    int heads, b, s_q, s_k, topk;
    double peer_us;
    in >> op >> heads >> b >> s_q >> s_k >> topk >> peer_us;
    const double us = bench.time(op, heads, b, s_q, s_k, topk);
    const double bytes = double(b) * s_k * (op == "select" ? 4.0 * s_q : 132);
    std::printf("%-6s h%-2d b%-4d s%d %7d  %8.2f us  %7.1f GB/s", op.c_str(), heads, b, s_q, s_k,
                us, bytes / us * 1e-3);
    if (peer_us > 0) {
      std::printf("  peer %8.2f, speed x%.3f", peer_us, peer_us / us);
      speed.add(peer_us / us);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
  if (speed.count)
    std::printf("geometric mean: x%.3f the speed of the peer over %d rows\n", speed.value(),
                speed.count);
  return bench.failures ? 1 : 0;
}
