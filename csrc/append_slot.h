// Where a new row goes. Shared by cpu/ and sm90/.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "params/cache_append.h"

namespace flashmla {

struct AppendSlot {
  int64_t block;  // -1 where the row is to be dropped
  int token;      // of the block
};

// Of row j of sequence i.
FLASHMLA_HOST_DEVICE inline AppendSlot find_slot(const CacheAppendParams& params, int64_t i,
                                                 int64_t j) {
  if (j >= params.num_new[i]) return {-1, 0};
  const int64_t position = params.positions[i] + j;
  if (position < 0) return {-1, 0};
  const int64_t entry = position / params.block_size;
  if (entry >= params.max_blocks) return {-1, 0};
  const int64_t block = params.block_table[i * params.max_blocks + entry];
  if (block < 0 || block >= params.num_blocks) return {-1, 0};
  return {block, static_cast<int>(position % params.block_size)};
}

}  // namespace flashmla
