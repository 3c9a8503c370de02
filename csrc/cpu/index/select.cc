#include "cpu/index/select.h"

#include <algorithm>
#include <cstddef>

namespace flashmla::cpu {
namespace {

constexpr int kBins = 2048;
constexpr int kCopies = 4;  // of the histogram: an increment does not wait for the one before it

// The least key that is selected, and how many of those that equal it.
struct Threshold {
  uint32_t key;
  int64_t ties;
};

// Finds the bin of (key >> shift) % bins that holds the k-th highest of the keys, and takes those
// above it off k.
uint32_t find_bin(const std::vector<uint32_t>& keys, int shift, uint32_t bins, int64_t& k) {
  uint32_t histogram[kCopies][kBins] = {};
  size_t i = 0;
  for (; i + kCopies <= keys.size(); i += kCopies) {
    for (int c = 0; c < kCopies; ++c) ++histogram[c][keys[i + c] >> shift & (bins - 1)];
  }
  for (; i < keys.size(); ++i) ++histogram[0][keys[i] >> shift & (bins - 1)];
  uint32_t bin = bins - 1;
  for (;; --bin) {
    int64_t count = 0;
    for (const auto& copy : histogram) count += copy[bin];
    if (count >= k || bin == 0) return bin;
    k -= count;
  }
}

// Copies the keys of a bin to `to`, which may be `from`.
void keep_bin(const std::vector<uint32_t>& from, int shift, uint32_t bins, uint32_t bin,
              std::vector<uint32_t>& to) {
  const size_t n = from.size();
  to.resize(std::max(to.size(), n));
  size_t kept = 0;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t key = from[i];
    to[kept] = key;
    kept += (key >> shift & (bins - 1)) == bin;
  }
  to.resize(kept);
}

// The k-th highest key, by its leading 11, the next 11 and the last 10 bits. There are more than k.
Threshold find_threshold(const std::vector<uint32_t>& keys, int64_t k,
                         std::vector<uint32_t>& candidates) {
  const uint32_t first = find_bin(keys, 21, 2048, k);
  keep_bin(keys, 21, 2048, first, candidates);
  const uint32_t second = find_bin(candidates, 10, 2048, k);
  keep_bin(candidates, 10, 2048, second, candidates);
  const uint32_t third = find_bin(candidates, 0, 1024, k);
  return {first << 21 | second << 10 | third, k};
}

}  // namespace

void Selection::select(int k) {
  const auto n = static_cast<int64_t>(keys.size());
  const int64_t selectable = n - std::count(keys.begin(), keys.end(), 0u);
  const int64_t selected = std::min<int64_t>(k, selectable);
  Threshold least = {1, n};
  if (k < selectable) least = find_threshold(keys, k, candidates);
  positions.resize(selected + 1);  // one more: each is written before it is known to be one
  int64_t count = 0, ties = least.ties;
  for (int64_t i = 0; i < n && count < selected; ++i) {
    const bool tied = keys[i] == least.key && ties > 0;
    positions[count] = static_cast<int32_t>(i);
    count += tied || keys[i] > least.key;
    ties -= tied;
  }
  positions.resize(selected);
}

}  // namespace flashmla::cpu
