// The highest of many scores, exactly.
#pragma once

#include <cstdint>
#include <vector>

namespace flashmla::cpu {

// Compares as scores do, -0 as 0; 0 of what is never selected: -inf and NaN.
inline uint32_t selection_key(uint32_t score_bits) {
  const uint32_t bits = score_bits == 0x80000000 ? 0 : score_bits;
  const uint32_t key = bits >> 31 ? ~bits : bits | 0x80000000;
  return (bits & 0x7fffffff) > 0x7f800000 || bits == 0xff800000 ? 0 : key;
}

// One thread's working memory; it outlives calls.
struct Selection {
  std::vector<uint32_t> keys;  // [n]
  std::vector<uint32_t> candidates;
  std::vector<int32_t> positions;  // of what is selected, ascending

  // Selects the k highest of `keys`, or all but zeros where they are fewer; of equal ones those
  // that come first. Takes time linear in n, whatever the keys.
  void select(int k);
};

}  // namespace flashmla::cpu
