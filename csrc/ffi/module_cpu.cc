// The extension module jax_flashmla._cpu: XLA FFI handlers for the platform "cpu".
#include <nanobind/nanobind.h>

#include "cpu/cache_append.h"
#include "cpu/dense_decode.h"
#include "cpu/make_schedule.h"
#include "ffi/module.h"
#include "ffi/thread_pool.h"

namespace flashmla::ffi {
namespace {

using xla::ffi::Ffi;
using xla::ffi::ThreadPool;

template <typename Params, Status (*kRun)(const Params&, const cpu::ParallelFor&)>
Status run_on_pool(const Params& params, ThreadPool& pool) {
  return kRun(params, parallel_for(pool));
}

template <typename Params, auto kRun>
constexpr auto cpu_handler = checked_call<Params, run_on_pool<Params, kRun>>;

XLA_FFI_DEFINE_HANDLER(make_schedule, (cpu_handler<MakeScheduleParams, cpu::run_make_schedule>),
                       bind_make_schedule(Ffi::Bind().Ctx<ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(dense_decode, (cpu_handler<DenseDecodeParams, cpu::run_dense_decode>),
                       bind_dense_decode(Ffi::Bind().Ctx<ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(cache_append, (cpu_handler<CacheAppendParams, cpu::run_cache_append>),
                       bind_cache_append(Ffi::Bind().Ctx<ThreadPool>()));

}  // namespace
}  // namespace flashmla::ffi

NB_MODULE(_cpu, module) {
  using namespace flashmla::ffi;
  define_functions(module, make_schedule, dense_decode, cache_append);
}
