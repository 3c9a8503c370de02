// Groups of CPU devices, which are threads of one process, and where they meet.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "params/peers.h"
#include "status.h"

namespace flashmla::cpu {

// What a device brings to a call.
struct Shown {
  int call;                           // which operation on what: alike on all devices
  std::array<int64_t, 2> sizes;       // of its arrays: alike too
  std::array<const void*, 2> x = {};  // the arrays
};

// Where the threads of a group meet: once to show their x, once more before any of them goes away
// with it.
class Rendezvous {
 public:
  Rendezvous(int size, int64_t timeout_ns) : size_(size), timeout_(timeout_ns) {}

  // False where a member did not come in time, then and ever after.
  bool meet() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (failed_) return false;
    const int64_t round = round_;
    if (++present_ == size_) {
      present_ = 0;
      ++round_;
      all_present_.notify_all();
      return true;
    }
    const auto over = [&] { return round_ != round || failed_; };
    if (!all_present_.wait_for(lock, timeout_, over)) {
      failed_ = true;
      all_present_.notify_all();
    }
    return round_ != round;
  }

  bool failed() {
    std::lock_guard<std::mutex> lock(mutex_);
    return failed_;
  }

  std::array<Shown, kMaxPeers> shown = {};  // by rank; of the meeting's own members

 private:
  const int size_;
  const std::chrono::nanoseconds timeout_;
  std::mutex mutex_;
  std::condition_variable all_present_;
  int present_ = 0;
  int64_t round_ = 0;
  bool failed_ = false;
};

// Shows x to the group's other devices, does `work` with what all of them show, by rank, and goes
// when all have done theirs.
Status meet_group(const char* operation, int64_t group, int device, const Shown& mine,
                  const std::function<void(const Member&, const Shown*)>& work);

// As in sm90/peers/workspace.h. No other process can be reached.
Status open_group(const Member& member, std::string* handle);
Status reach_member(int64_t group, int device, int peer_rank, int peer_device,
                    const std::string& handle);
bool has_failed(int64_t group, int device);
void close_group(int64_t group, int device);

}  // namespace flashmla::cpu
