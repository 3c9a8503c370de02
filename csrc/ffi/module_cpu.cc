// The extension module jax_flashmla._cpu: XLA FFI handlers for the platform "cpu".
#include "cpu/groups.h"
#include "cpu/parallel_for.h"
#include "ffi/chain.h"
#include "ffi/groups.h"
#include "ffi/module.h"
#include "ffi/thread_pool.h"

namespace flashmla::ffi {

template <typename Params, Status (*kRun)(const Params&, const cpu::ParallelFor&)>
Status run_on_pool(const Params& params, xla::ffi::ThreadPool& pool) {
  return kRun(params, parallel_for(pool));
}

}  // namespace flashmla::ffi

// cpu/<name>.cc defines cpu::run_<name>.
#define FLASHMLA_OPERATION(name, Params)                                                         \
  namespace flashmla::cpu {                                                                      \
  Status run_##name(const Params&, const ParallelFor&);                                          \
  }                                                                                              \
  namespace flashmla::ffi {                                                                      \
  XLA_FFI_DEFINE_HANDLER(                                                                        \
      name##_handler, (checked_call<Params, read_##name, run_on_pool<Params, cpu::run_##name>>), \
      bind_##name(xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>()));                           \
  const bool name##_added = add_registration("flashmla_" #name "_v1", name##_handler);           \
  }
#include "ffi/operations.h"

namespace {

struct Groups {
  static constexpr auto open_group = flashmla::cpu::open_group;
  static constexpr auto reach_member = flashmla::cpu::reach_member;
  static constexpr auto has_failed = flashmla::cpu::has_failed;
  static constexpr auto close_group = flashmla::cpu::close_group;
};

}  // namespace

NB_MODULE(_cpu, module) {
  flashmla::ffi::define_functions(module);
  flashmla::ffi::define_groups<Groups>(module);
}
