// Whether the operation that this thread launches follows another of its chain (ffi/chain.h).
#pragma once

namespace flashmla {

// If so, the kernels before its own are of such operations, back to the chain's beginning.
inline thread_local bool follows_in_chain = false;

class Chained {
 public:
  explicit Chained(bool follows) { follows_in_chain = follows; }
  ~Chained() { follows_in_chain = false; }
  Chained(const Chained&) = delete;
};

}  // namespace flashmla
