// wgmma's A fragments from rows of e4m3 codes in shared memory: keys, whose tokens are the
// fragment's rows, and values transposed, whose columns are.
#pragma once

#include "sm90/formats/codes.cuh"
#include "sm90/ptx/matrix.cuh"

namespace flashmla::sm90 {

// Raw bytes of 64 columns of a warp's sixteen tokens: of each lane row g = lane / 4, row g + 8 of
// the first sixteen columns, then of the next sixteen. A lane's four bytes are columns 4 (lane % 4)
// to 4 (lane % 4) + 3 of the sixteen. rows: lane % 16's row, plus 16 (lane / 16) bytes.
__device__ __forceinline__ void load_keys(uint32_t (&raw)[8], uint32_t rows, int chunk) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    load_matrix_x4(*reinterpret_cast<uint32_t (*)[4]>(raw + 4 * i), rows + chunk * 64 + i * 32);
  }
}

// A fragments, k16 by k16: f16 of the codes. Of each sixteen columns the pair 2t comes to place t,
// 2t + 1 to t + 4.
template <int kCount>
__device__ __forceinline__ void convert_keys(uint32_t* a, const uint32_t (&raw)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    a[i / 2 * 4 + i % 2] = codes_to_f16<false>(raw[i]);
    a[i / 2 * 4 + i % 2 + 2] = codes_to_f16<true>(raw[i]);
  }
}

// The same, times an f16x2 factor for each of the lane's two rows.
template <int kCount>
__device__ __forceinline__ void convert_keys(uint32_t* a, const uint32_t (&raw)[kCount],
                                             const uint32_t (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = i % 2;
    a[i / 2 * 4 + row] = multiply_f16x2(codes_to_f16<false>(raw[i]), factor[row]);
    a[i / 2 * 4 + row + 2] = multiply_f16x2(codes_to_f16<true>(raw[i]), factor[row]);
  }
}

// Raw bytes of the warp's sixteen columns of 32 tokens, by eights of tokens: of each lane columns
// 2g and 2g + 1, g = lane / 4, of tokens 2t and 2t + 1, t = lane % 4. address: of the lane's token.
__device__ __forceinline__ void load_values(uint32_t (&raw)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw[0]), "=r"(raw[1]), "=r"(raw[2]), "=r"(raw[3])
               : "r"(address)
               : "memory");
}

// Those of 16 tokens, whose lanes are the first sixteen.
__device__ __forceinline__ void load_half_values(uint32_t* raw, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(raw[0]), "=r"(raw[1])
               : "r"(address)
               : "memory");
}

// The A fragment of 16 tokens in bf16, times a factor (and 2^-120) for each pair of tokens: row g
// of the warp's sixteen is column 2g, row g + 8 is column 2g + 1.
__device__ __forceinline__ void convert_values(uint32_t* a, const uint32_t* raw,
                                               const uint32_t* factor, uint32_t after = 0) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    a[2 * k] = multiply_bf16x2(place_codes<kBytes02>(raw[k], after), factor[k]);
    a[2 * k + 1] = multiply_bf16x2(place_codes<kBytes13>(raw[k], after), factor[k]);
  }
}

// The same fragment in f16, of the codes alone. after: any register, which is not used but for the
// time at which it is there: ptxas, else, begins as soon as raw bytes are loaded, and waits for
// them.
__device__ __forceinline__ void convert_values(uint32_t* a, const uint32_t* raw, uint32_t after) {
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    uint32_t columns;  // two tokens of column 2g, then of 2g + 1
    asm("prmt.b32 %0, %1, %2, 0x3120;" : "=r"(columns) : "r"(raw[k]), "r"(after));
    a[2 * k] = codes_to_f16<false>(columns);
    a[2 * k + 1] = codes_to_f16<true>(columns);
  }
}

}  // namespace flashmla::sm90
