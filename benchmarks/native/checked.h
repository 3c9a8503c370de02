// Ends the program where CUDA or an operation says that something went wrong.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "status.h"

#define CHECK(call)                                                                        \
  do {                                                                                     \
    const cudaError_t error = (call);                                                      \
    if (error != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error)); \
      std::exit(1);                                                                        \
    }                                                                                      \
  } while (0)

#define CHECK_STATUS(call)                                    \
  do {                                                        \
    const flashmla::Status status = (call);                   \
    if (!status.ok()) {                                       \
      std::printf("%s: %s\n", #call, status.message.c_str()); \
      std::exit(1);                                           \
    }                                                         \
  } while (0)
