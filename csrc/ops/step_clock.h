// How long each Step of a Schedule took, to profile a walk. A Run without a clock measures nothing.
#pragma once

#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <vector>

namespace fastmaml {

inline int64_t nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

struct StepTime {
  int64_t ns = 0;
  int64_t calls = 0;
  int64_t least = std::numeric_limits<int64_t>::max();  // of the fastest call
  StepTime& operator+=(const StepTime& more) {
    ns += more.ns;
    calls += more.calls;
    least = std::min(least, more.least);
    return *this;
  }
};

// Times the Steps of one Schedule in one worker. A Step's time runs from the end of the previous Step to its own end.
// Work of the walk between two ops therefore counts for the second op.
// If the system interrupts the worker, that time is subtracted. It is found by the worker's CPU time.
// Reading the CPU time is a system call, so it happens only after a Step that seems long.
class StepClock {
 public:
  explicit StepClock(size_t steps = 0) : times_(steps) {}

  void start() {
    last_ = nanoseconds();
    set_mark();
  }

  void finished(size_t step) {
    const int64_t now = nanoseconds();
    int64_t took = now - last_;
    if (took > kLong) {
      const int64_t ran_before = ran_, mark_before = mark_;
      set_mark();
      took = std::max(took - std::max<int64_t>((now - mark_before) - (ran_ - ran_before), 0), kLeast);
      last_ = mark_;
    } else {
      last_ = now;
    }
    times_[step] += {took, 1, took};
  }

  const std::vector<StepTime>& times() const { return times_; }

 private:
  static constexpr int64_t kLong = 20'000, kLeast = 1;  // ns
  std::vector<StepTime> times_;
  int64_t last_ = 0;
  int64_t mark_ = 0, ran_ = 0;  // when the CPU time was read, and its value

  void set_mark() {
    timespec ran;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ran);
    ran_ = int64_t(ran.tv_sec) * 1'000'000'000 + ran.tv_nsec;
    mark_ = nanoseconds();
  }
};

}  // namespace fastmaml
