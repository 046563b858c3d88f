#include "bindings/threads.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <set>
#include <thread>

namespace fastmaml {

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

// Exceptions of a body are carried to the caller here. Torch's C entry would replace their text.
void in_parallel(int64_t n, const std::function<void(int64_t)>& body) {
  std::mutex mutex;
  std::exception_ptr error;
  torch::stable::parallel_for(0, n, 1, [&](int64_t from, int64_t to) {
    try {
      for (int64_t i = from; i < to; ++i) body(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// Every index waits, at most a second, until all have begun. So a fast thread cannot take several.
int threads_seen() {
  const int64_t n = thread_count();
  std::atomic<int64_t> begun{0};
  std::mutex mutex;
  std::set<std::thread::id> seen;
  const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  in_parallel(n, [&](int64_t) {
    ++begun;
    while (begun < n && std::chrono::steady_clock::now() < patience) std::this_thread::yield();
    const std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return static_cast<int>(seen.size());
}

}  // namespace fastmaml
