// One token's row into a block, in the cache's format.
#pragma once

#include "append_slot.h"
#include "params/cache_append.h"

namespace flashmla::cpu {

// row [h_kv, d] of params.rows_dtype to its slot, which exists.
void store_row(const CacheAppendParams& params, const void* row, AppendSlot slot);

// Copies the cache first where the result is not the operand's own buffer.
void begin_append(const CacheAppendParams& params);

}  // namespace flashmla::cpu
