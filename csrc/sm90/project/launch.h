#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "params/project.h"
#include "status.h"

namespace flashmla::sm90 {

// Bytes that a later call reads: brought to L2 behind a kernel's own loads.
struct Ahead {
  const void* data;
  int64_t bytes;  // a multiple of 16
};
constexpr int kMaxAhead = 2;

// A kernel's place among others of one call.
struct Chain {
  // x, alone of its operands, is made by the previous kernel of the stream: it may start before
  // that one has ended.
  bool dependent = false;
  Ahead ahead[kMaxAhead] = {};
};

Status run_project(const ProjectParams& params, cudaStream_t stream, const Chain& chain);
Status run_project(const ProjectParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
