// What a warpgroup is.
#pragma once

namespace flashmla::sm90 {

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupWarps = kWarpgroupThreads / 32;

}  // namespace flashmla::sm90
