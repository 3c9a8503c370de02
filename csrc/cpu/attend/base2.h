// Scores are in base 2 within the operations, natural outside.
#pragma once

namespace flashmla::cpu {

constexpr float kLog2E = 1.44269504088896341f;  // from natural to base 2
constexpr float kLn2 = 0.693147180559945309f;   // and back

}  // namespace flashmla::cpu
