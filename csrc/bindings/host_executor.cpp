#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bindings/call_memory.h"
#include "bindings/executor.h"
#include "bindings/finite.h"
#include "bindings/result_pool.h"
#include "bindings/threads.h"
#include "ops/tree_sum.h"
#include "plan/profile.h"
#include "program/param_layout.h"

namespace fastmaml {
namespace {

// moves `count` vectors, starting at number `first`
template <class T>
void reorder_as(const Executor::Params& params, bool from_torch, void* to, const void* from, int64_t first, int64_t count) {
  const int64_t at = first * size_of(params);
  if (from_torch)
    params_from_torch(params, static_cast<T*>(to) + at, static_cast<const T*>(from) + at, count);
  else
    params_to_torch(params, static_cast<T*>(to) + at, static_cast<const T*>(from) + at, count);
}

void reorder_some(const Executor::Params& params, bool from_torch, void* to, const void* from, int64_t first, int64_t count,
                  size_t real_bytes) {
  if (real_bytes == sizeof(float))
    reorder_as<float>(params, from_torch, to, from, first, count);
  else
    reorder_as<double>(params, from_torch, to, from, first, count);
}

// Memory comes from a CallMemory that outlives the call: after the first call nothing is allocated.
class HostExecutor : public Executor {
 public:
  void* take(size_t bytes) override { return memory_->take(bytes); }

  Tensor empty(const std::vector<int64_t>& sizes, Type type) override { return empty_on_host(sizes, type); }

  void copy(void* to, const void* from, size_t bytes) override {
    if (bytes) std::memcpy(to, from, bytes);
  }

  void numbers(void* to, const double* values, size_t count, size_t real_bytes) override {
    if (real_bytes == sizeof(float))
      std::copy(values, values + count, static_cast<float*>(to));
    else
      std::copy(values, values + count, static_cast<double*>(to));
  }

  void reorder(const Params& params, bool from_torch, void* to, const void* from, int64_t count, size_t real_bytes) override {
    in_parallel(count, [&](int64_t i) { reorder_some(params, from_torch, to, from, i, 1, real_bytes); });
  }

  // Done by the worker that walks the task, just before the walk, so that the numbers are in its cache.
  void reorder_tasks(const Params& params, void* to, const void* from, int64_t, int64_t count, size_t real_bytes) override {
    moves_.push_back({&params, to, from, count, real_bytes});
  }

  // Also done by the task's worker, just before the walk. A task with refused numbers is not walked.
  void expect_finite(const char* name, const void* x, int64_t count, size_t real_bytes) override {
    checks_.push_back({name, x, count, real_bytes});
  }

  void run(const std::shared_ptr<const Plan>& plan, View* args, int64_t tasks, const PythonLossFn& loss) override {
    Run run{*plan->table, plan->schedule, plan->workspace, args, tasks, plan->lanes()};
    const int64_t groups = (tasks + plan->lanes() - 1) / plan->lanes();
    const int workers = static_cast<int>(std::min<int64_t>(groups, thread_count()));
    WalkClocks clocks(plan, workers, tasks);
    run.clocks = clocks.get();
    std::atomic<size_t> refused{checks_.size()};
    const auto prepare = [&](int64_t first, int64_t count) {
      for (size_t i = 0; i < checks_.size(); ++i)
        if (!checks_[i].passes(first, count)) {
          for (size_t least = refused; i < least && !refused.compare_exchange_weak(least, i);) continue;
          return false;
        }
      for (const Move& m : moves_) reorder_some(*m.params, true, m.to, m.from, first * m.count, count * m.count, m.real_bytes);
      return true;
    };
    const auto expect_none_refused = [&] {
      if (refused < checks_.size()) throw std::invalid_argument(std::string(checks_[refused].name) + " holds NaN or infinite values");
    };
    const bool prepares = !moves_.empty() || !checks_.empty();
    if (plan->program->loss.kind == Loss::Kind::caller) {
      run.python_loss = loss;
      place_sums(args, tasks, plan->table->real_bytes);
      if (prepares) in_parallel(tasks, [&](int64_t task) { prepare(task, 1); });
      expect_none_refused();
      run_segments(run, memory_->arenas, workers, in_parallel);
      for (const Sum& sum : sums_) reduce(*plan->table, sum, args[static_cast<int>(sum.arg)].data, tasks);
    } else {
      if (prepares) run.before = prepare;
      std::deque<TreeSum> sums;
      for (const Sum& s : sums_)
        sums.emplace_back(*plan->table, s.arg, s.out, s.w, tasks, s.size, plan->lanes(), workers,
                          take(TreeSum::room(*plan->table, tasks, s.size, plan->lanes(), workers)));
      run.sums = &sums;
      run_resident(run, memory_->arenas, workers, in_parallel);
      expect_none_refused();
      for (TreeSum& sum : sums) sum.finish(workers, in_parallel);
    }
    moves_.clear();
    checks_.clear();
    sums_.clear();
  }

 private:
  void reduce(const OpTable& table, const Sum& sum, void* x, int64_t tasks) {
    constexpr int64_t kShare = 16 * 1024;  // numbers that are worth one thread
    const int64_t size = sum.size, shares = std::min<int64_t>(thread_count(), tasks * size / kShare), bytes = int64_t(table.real_bytes);
    const int64_t share = shares > 1 ? (size + shares - 1) / shares : size;
    const auto columns = [&](int64_t i) {
      const int64_t from = i * share, count = std::min(share, size - from);
      if (count <= 0) return;
      table.tree_reduce(static_cast<std::byte*>(sum.out) + from * bytes, static_cast<std::byte*>(x) + from * bytes, sum.w, tasks, count,
                        size, 0);
    };
    shares > 1 ? in_parallel(shares, columns) : columns(0);
  }

  struct Move {
    const Params* params;
    void* to;
    const void* from;
    int64_t count;  // vectors for each task
    size_t real_bytes;
  };
  struct Check {
    const char* name;
    const void* x;
    int64_t count;  // numbers for each task
    size_t real_bytes;
    bool passes(int64_t first, int64_t tasks) const {
      return all_finite(static_cast<const std::byte*>(x) + size_t(first * count) * real_bytes, tasks * count, real_bytes);
    }
  };
  CallMemoryLease memory_;
  std::vector<Move> moves_;
  std::vector<Check> checks_;
};

}  // namespace

std::unique_ptr<Executor> host_executor() { return std::make_unique<HostExecutor>(); }

}  // namespace fastmaml
