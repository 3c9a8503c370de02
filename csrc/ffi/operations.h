// The only list of operations. Each header ends in FLASHMLA_OPERATION, which the module that
// includes this has defined: see module_cpu.cc and module_cuda.cc.
#include "ffi/all_reduce_sum.h"
#include "ffi/cache_append.h"
#include "ffi/dense_decode.h"
#include "ffi/exchange.h"
#include "ffi/index_scores.h"
#include "ffi/index_topk.h"
#include "ffi/latent_append.h"
#include "ffi/make_schedule.h"
#include "ffi/project.h"
#include "ffi/project_twice.h"
#include "ffi/sparse_decode.h"
#include "ffi/sparse_prefill.h"
