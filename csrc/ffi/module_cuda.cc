// The extension module jax_flashmla._cuda: XLA FFI handlers for the platform "CUDA". They allocate
// nothing, never wait for the device and launch the same kernels whatever the data, so XLA may
// capture them in CUDA graphs.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>

#include "ffi/module.h"
#include "sm90/cache_append/launch.h"
#include "sm90/dense_decode/launch.h"
#include "sm90/make_schedule/launch.h"

namespace flashmla::ffi {
namespace {

using xla::ffi::Ffi;
using xla::ffi::Traits;
using Stream = xla::ffi::PlatformStream<cudaStream_t>;

XLA_FFI_DEFINE_HANDLER(make_schedule, (checked_call<MakeScheduleParams, sm90::run_make_schedule>),
                       bind_make_schedule(Ffi::Bind().Ctx<Stream>()),
                       {Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(dense_decode, (checked_call<DenseDecodeParams, sm90::run_dense_decode>),
                       bind_dense_decode(Ffi::Bind().Ctx<Stream>()),
                       {Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(cache_append, (checked_call<CacheAppendParams, sm90::run_cache_append>),
                       bind_cache_append(Ffi::Bind().Ctx<Stream>()),
                       {Traits::kCmdBufferCompatible});

}  // namespace
}  // namespace flashmla::ffi

NB_MODULE(_cuda, module) {
  using namespace flashmla::ffi;
  define_functions(module, make_schedule, dense_decode, cache_append);
}
