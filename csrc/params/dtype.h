// Element types of queries, rows and results.
#pragma once

#include <cstdint>

namespace flashmla {

enum class DType : int32_t { kBFloat16, kFloat16, kFloat32 };

constexpr int itemsize(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace flashmla
