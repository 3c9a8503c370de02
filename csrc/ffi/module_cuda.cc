// The extension module jax_flashmla._cuda: XLA FFI handlers for the platform "CUDA". They allocate
// nothing, never wait for the device and launch the same kernels whatever the data, so XLA may
// capture them in CUDA graphs.
#include <cuda_runtime_api.h>

#include "ffi/chain.h"
#include "ffi/groups.h"
#include "ffi/module.h"
#include "sm90/peers/workspace.h"

// sm90/<name>/launch.cu defines sm90::run_<name>.
#define FLASHMLA_OPERATION(name, Params)                                                \
  namespace flashmla::sm90 {                                                            \
  Status run_##name(const Params&, cudaStream_t);                                       \
  }                                                                                     \
  namespace flashmla::ffi {                                                             \
  XLA_FFI_DEFINE_HANDLER(                                                               \
      name##_handler, (checked_call<Params, read_##name, sm90::run_##name>),            \
      bind_##name(xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()), \
      {xla::ffi::Traits::kCmdBufferCompatible});                                        \
  const bool name##_added = add_registration("flashmla_" #name "_v1", name##_handler);  \
  }
#include "ffi/operations.h"

namespace {

struct Groups {
  static constexpr auto open_group = flashmla::sm90::open_group;
  static constexpr auto reach_member = flashmla::sm90::reach_member;
  static constexpr auto has_failed = flashmla::sm90::has_failed;
  static constexpr auto close_group = flashmla::sm90::close_group;
};

}  // namespace

NB_MODULE(_cuda, module) {
  flashmla::ffi::define_functions(module);
  flashmla::ffi::define_groups<Groups>(module);
}
