#include "sm90/sparse_prefill/launch.h"

namespace flashmla::sm90 {

// There is no kernel yet: the operation's `refusal` sends calls to the reference.
Status run_sparse_prefill(const SparsePrefillParams&, cudaStream_t) {
  return Status::FailedPrecondition("sparse_prefill has no Hopper kernel");
}

}  // namespace flashmla::sm90
