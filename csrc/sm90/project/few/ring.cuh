// A warp's part of the sum over k: weights come by plain loads of 16 bytes into a ring of
// registers, and are multiplied from there.
#pragma once

#include <cstdint>

#include "params/project.h"
#include "sm90/project/few/config.h"
#include "sm90/project/tile.cuh"
#include "sm90/ptx/mma.cuh"
#include "sm90/ptx/tma.cuh"

namespace flashmla::sm90::project::few {

// 16 bytes that are read once, by this lane alone.
__device__ __forceinline__ void load_once(uint32_t (&v)[4], const char* p) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(p), "l"(kEvictFirst));
}

__device__ __forceinline__ void load_words(uint32_t (&v)[2], const char* p) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(p));
}
__device__ __forceinline__ void load_words(uint32_t (&v)[4], const char* p) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(p));
}

// Lane 4 g + t has columns 8 g to 8 g + 7 of the tile's 64, and a quarter t of each step of k: four
// rows of weights in a step of 16, or of transposed weights eight elements of each column in a step
// of 32. Which of k's elements an instruction takes for which does not matter, as x's are taken the
// same way.
template <class T, bool kTransposed>
struct Ring {
  static constexpr int kStepDepth = kTransposed ? 32 : 16, kWords = kStepDepth / 8;
  static constexpr int kStepQuarters = kStepDepth / 16;
  static constexpr int kSteps = kQuarters / kStepQuarters;

  const char *weights, *rows;                               // this lane's next ones
  int load_stride, quarter_stride, step_stride, rows_step;  // bytes
  bool has_row;                                             // whether this lane's row of x is there
  uint32_t w[kSteps][kStepQuarters][kLoads][4], x[kSteps][kWords];

  // From step `first` on, every `stride`-th.
  __device__ __forceinline__ Ring(const ProjectParams& p, const Tile& tile, int group, int first,
                                  int stride) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int n = p.n_of[tile.weight], depth = first * kStepDepth + t * (kStepDepth / 4);
    // Past the last column the first ones are loaded again, and not stored.
    const int column = tile.begin + (8 * g < tile.count ? 8 * g : 0);
    load_stride = (kTransposed ? p.k : n) * 2, quarter_stride = kLoads * load_stride;
    step_stride = stride * kStepDepth * (kTransposed ? 2 : load_stride);
    weights = static_cast<const char*>(p.w[tile.weight]) + int64_t{group} * p.k * n * 2 +
              int64_t{kTransposed ? column : depth} * load_stride +
              (kTransposed ? depth : column) * 2;
    const int64_t row_stride = int64_t{p.groups} * (p.k + p.rope);
    rows = static_cast<const char*>(p.x) +
           (g * row_stride + int64_t{group} * (p.k + p.rope) + depth) * 2;
    rows_step = stride * kStepDepth * 2;
    has_row = g < p.rows;
  }

  __device__ __forceinline__ void load_quarter(int slot, int q) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      load_once(w[slot][q][i], weights + q * quarter_stride + i * load_stride);
    }
  }

  __device__ __forceinline__ void load_rows(int slot) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) x[slot][i] = 0;
    if (has_row) load_words(x[slot], rows);
    rows += rows_step;
  }

  // d[j]: of columns 8 g + 2 j and 2 j + 1, and rows 2 t and 2 t + 1.
  __device__ __forceinline__ void multiply_quarter(int slot, int q, float (&d)[4][4]) {
    const auto& v = w[slot][q];
    const auto add = [&](int j, const uint32_t (&a)[4], int word) {
      mma_16816<T>(d[j], a, x[slot][word], x[slot][word + 1]);
    };
    if constexpr (kTransposed) {
#pragma unroll
      for (int i = 0; i < kLoads; i += 2) {  // two columns
#pragma unroll
        for (int word = 0; word < 4; word += 2) {
          const uint32_t a[4] = {v[i][word], v[i + 1][word], v[i][word + 1], v[i + 1][word + 1]};
          add(2 * q + i / 2, a, word % kWords);
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // rows of weights side by side in a register
        const uint32_t a[4] = {
            __byte_perm(v[0][j], v[1][j], 0x5410), __byte_perm(v[0][j], v[1][j], 0x7632),
            __byte_perm(v[2][j], v[3][j], 0x5410), __byte_perm(v[2][j], v[3][j], 0x7632)};
        add(j, a, 0);
      }
    }
  }

  // The first loads, for steps up to `end`.
  __device__ __forceinline__ void load_first_weights(int first, int end, int stride) {
#pragma unroll
    for (int slot = 0; slot < kSteps; ++slot) {
      if (first + slot * stride < end) {
#pragma unroll
        for (int q = 0; q < kStepQuarters; ++q) load_quarter(slot, q);
        weights += step_stride;
      }
    }
  }
  __device__ __forceinline__ void load_first_rows(int first, int end, int stride) {
#pragma unroll
    for (int slot = 0; slot < kSteps; ++slot) {
      if (first + slot * stride < end) load_rows(slot);
    }
  }

  // A quarter is loaded again as soon as it has been multiplied.
  __device__ __forceinline__ void multiply(int first, int end, int stride, float (&d)[4][4]) {
#pragma unroll 1
    for (int step = first; step < end;) {
#pragma unroll
      for (int slot = 0; slot < kSteps; ++slot) {
        if (step >= end) break;
        const bool more = step + kSteps * stride < end;
        step += stride;
#pragma unroll
        for (int q = 0; q < kStepQuarters; ++q) {
          multiply_quarter(slot, q, d);
          if (more) load_quarter(slot, q);
        }
        if (more) {
          load_rows(slot);
          weights += step_stride;
        }
      }
    }
  }
};

}  // namespace flashmla::sm90::project::few
