// Launching kernels and reporting what went wrong.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "status.h"

namespace flashmla::sm90 {

inline Status to_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::Ok();
  return Status::FailedPrecondition(std::string(what) + ": " + cudaGetErrorString(error));
}

// FailedPrecondition unless the current device is of compute capability 9.0.
inline Status require_hopper() {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error != cudaSuccess) return to_status(error, "querying the device");
  if (major == 9 && minor == 0) return Status::Ok();
  return Status::FailedPrecondition("the kernels need a GPU of compute capability 9.0, got " +
                                    std::to_string(major) + "." + std::to_string(minor));
}

// Multiprocessors of the current device.
inline Status count_multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  }
  return to_status(error, "querying the device");
}

struct LaunchOptions {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool dependent = false;  // may start before the previous kernel of the stream has finished
  // Asks for as much of a multiprocessor's 256 KB as shared memory as there can be: the driver
  // would leave L1 more, and so no room for another kernel's block beside this one's.
  bool most_shared = false;
  int cluster = 1;  // neighbouring blocks of grid.x that run together, up to 16
  // Of the most shared memory that there can be, what most_shared asks for; the rest is L1.
  int shared_percent = 100;
  // Reads fast through a large L1 alone: does not start beside blocks that leave it little.
  bool needs_l1 = false;
};

// Whether the kernel that this thread launched last, or one that it may have begun beside, leaves
// L1 little of a multiprocessor.
inline thread_local bool little_l1 = false;
constexpr size_t kMuchShared = 64 * 1024;  // bytes of a block

template <typename... Params, typename... Args>
Status launch(void (*kernel)(Params...), const LaunchOptions& options, cudaStream_t stream,
              const char* name, Args&&... args) {
  if (options.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, options.shared_bytes);
    if (error != cudaSuccess) return to_status(error, name);
  }
  if (options.cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return to_status(error, name);
  }
  const bool dependent = options.dependent && !(options.needs_l1 && little_l1);
  little_l1 = options.most_shared || options.shared_bytes > kMuchShared || (dependent && little_l1);
  cudaLaunchAttribute attributes[3];
  int count = 0;
  if (dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (options.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(options.cluster), 1, 1};
  }
  if (options.most_shared) {
    attributes[count].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    attributes[count++].val.sharedMemCarveout = options.shared_percent;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = options.grid;
  config.blockDim = options.block;
  config.dynamicSmemBytes = options.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return to_status(cudaLaunchKernelEx(&config, kernel, Params(args)...), name);
}

}  // namespace flashmla::sm90
