// A profile of the calls between start_profile and stop_profile: the time of every Step of every plan. For backends on
// the host.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ops/step_clock.h"
#include "plan/plan.h"

namespace fastmaml {

struct StepProfile {
  double seconds = 0;  // summed over the workers
  int64_t calls = 0;
  double least_seconds = 0;  // in the fastest call
};

struct PlanProfile {
  std::shared_ptr<const Plan> plan;
  int64_t walks = 0, tasks = 0;  // calls, and tasks in all calls
  int workers = 0;               // the most in one walk
  double wall_seconds = 0;       // of the walks only; callers time their own work
  std::vector<StepProfile> steps;
};

void start_profile();
std::vector<PlanProfile> stop_profile();  // in order of first run; empty if no profile was started

// The clocks of one walk's workers. After the walk their times join the profile. Without a profile there are no clocks.
class WalkClocks {
 public:
  WalkClocks(std::shared_ptr<const Plan> plan, int workers, int64_t tasks);
  ~WalkClocks();
  WalkClocks(const WalkClocks&) = delete;
  WalkClocks& operator=(const WalkClocks&) = delete;
  StepClock* get() { return clocks_.empty() ? nullptr : clocks_.data(); }

 private:
  std::shared_ptr<const Plan> plan_;
  int64_t tasks_;
  std::vector<StepClock> clocks_;
  int64_t start_ = 0;  // ns
};

}  // namespace fastmaml
