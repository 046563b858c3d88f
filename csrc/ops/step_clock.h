// How long each Step of a Schedule took, for a profile of a walk. A Run without a clock measures nothing.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <vector>
#ifdef __x86_64__
#include <x86intrin.h>
#endif

namespace fastmaml {

// A counter that costs a Step of a few hundred nanoseconds little to read. What one tick lasts, the reader finds out by seconds().
inline int64_t ticks() {
#ifdef __x86_64__
  return int64_t(__rdtsc());
#else
  return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

inline double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct StepTime {
  int64_t ticks = 0;
  int64_t calls = 0;
  int64_t least = std::numeric_limits<int64_t>::max();  // ticks of the fastest call, which other programs disturbed least
  StepTime& operator+=(const StepTime& more) {
    ticks += more.ticks;
    calls += more.calls;
    least = std::min(least, more.least);
    return *this;
  }
};

// The Steps of one Schedule as one worker walks them: from the end of a Step to the end of the next, so that what a walk does between
// two ops counts as the second one's.
class StepClock {
 public:
  explicit StepClock(size_t steps = 0) : times_(steps) {}
  void start() { last_ = fastmaml::ticks(); }
  void finished(size_t step) {
    const int64_t at = fastmaml::ticks();
    times_[step] += {at - last_, 1, at - last_};
    last_ = at;
  }
  const std::vector<StepTime>& times() const { return times_; }

 private:
  std::vector<StepTime> times_;
  int64_t last_ = 0;
};

}  // namespace fastmaml
