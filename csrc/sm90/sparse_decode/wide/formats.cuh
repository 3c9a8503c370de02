// What the kernel must know of a row format: where a token's columns and scales are.
#pragma once

#include <cstdint>

namespace flashmla::sm90::sparse::wide {

enum class Codes { kE4M3, kE2M1, kNone };  // kNone: 16-bit columns
enum class Scales { kNone, kFloat32, kE8M0, kE4M3 };

// kCodes of the leading kCodeColumns columns, a scale for each kGroup of them; then 16-bit columns,
// kTailOffset bytes into the row. kScaleOffset counts from the token's place in the scales' plane.
template <Codes kCodesOf, int kColumns, int kCoded, int kBytes, Scales kScalesOf = Scales::kNone,
          int kGroupOf = 1, int kScaleAt = 0, int kTailAt = 0, bool kSecondPlane = false>
struct RowFormat {
  static constexpr Codes kCodes = kCodesOf;
  static constexpr int kHeadDim = kColumns;
  static constexpr int kCodeColumns = kCoded;
  static constexpr int kRowBytes = kBytes;  // in the first plane
  static constexpr Scales kScales = kScalesOf;
  static constexpr int kGroup = kGroupOf, kScaleOffset = kScaleAt, kTailOffset = kTailAt;
  static constexpr bool kTwoPlanes = kSecondPlane;
  static constexpr int kScaleBytes = kSecondPlane ? 8 : 0;  // of a token in the second plane
};

using V32 = RowFormat<Codes::kE4M3, 576, 512, 656, Scales::kFloat32, 128, 512, 528>;
using V32Nope = RowFormat<Codes::kE4M3, 512, 512, 528, Scales::kFloat32, 128, 512>;
using V4 = RowFormat<Codes::kE4M3, 512, 448, 576, Scales::kE8M0, 64, 0, 448, true>;
using V41 = RowFormat<Codes::kE4M3, 512, 512, 528, Scales::kE8M0, 32, 512>;
using V41Fp4 = RowFormat<Codes::kE2M1, 512, 512, 288, Scales::kE4M3, 16, 256>;
using Fp8Row = RowFormat<Codes::kE4M3, 576, 576, 576>;
template <int kColumns>
using Dense = RowFormat<Codes::kNone, kColumns, 0, kColumns * 2>;

}  // namespace flashmla::sm90::sparse::wide
