// How CPU operations use threads: the caller owns the pool, the operations only hand out work.
#pragma once

#include <functional>

namespace flashmla::cpu {

// Calls body(i) once for each i in [0, n), in any order and on any threads, and returns when all
// are done. No body may wait for another one; a body does not throw.
using ParallelFor = std::function<void(int n, const std::function<void(int)>& body)>;

}  // namespace flashmla::cpu
