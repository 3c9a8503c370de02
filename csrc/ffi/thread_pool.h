// XLA's intra-op thread pool as the ParallelFor that cpu/ operations take.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>

#include "cpu/parallel_for.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla::ffi {

// Indices are claimed one at a time by the calling thread and by helpers on the pool. The caller
// waits only for indices that a running thread has claimed, never for a helper to be scheduled, so
// a full pool cannot deadlock. A helper that starts after the end finds nothing to claim; the
// shared state outlives the call for its sake, `body` does not and is not touched.
class IndexRange {
 public:
  IndexRange(int n, const std::function<void(int)>& body) : n_(n), body_(body) {}

  void work() {
    int completed = 0;
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_; ++completed) body_(i);
    if (completed == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    completed_ += completed;
    if (completed_ == n_) all_completed_.notify_one();
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_completed_.wait(lock, [this] { return completed_ == n_; });
  }

 private:
  const int n_;
  const std::function<void(int)>& body_;
  std::atomic<int> next_{0};
  std::mutex mutex_;
  std::condition_variable all_completed_;
  int completed_ = 0;
};

inline cpu::ParallelFor parallel_for(xla::ffi::ThreadPool& pool) {
  return [&pool](int n, const std::function<void(int)>& body) {
    const int helpers = static_cast<int>(std::min<int64_t>(n, pool.num_threads())) - 1;
    if (helpers <= 0) {
      for (int i = 0; i < n; ++i) body(i);
      return;
    }
    auto range = std::make_shared<IndexRange>(n, body);
    for (int i = 0; i < helpers; ++i) pool.Schedule([range] { range->work(); });
    range->work();
    range->wait();
  };
}

}  // namespace flashmla::ffi
