// A profile of the calls between start_profile and stop_profile: how long every Step of every plan took, on backends of the host.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "ops/step_clock.h"
#include "plan/plan.h"

namespace fastmaml {

struct StepProfile {
  double seconds = 0;  // summed over the workers, while they ran
  int64_t calls = 0;
  double least_seconds = 0;  // of the fastest call
};

struct PlanProfile {
  std::shared_ptr<const Plan> plan;
  int64_t walks = 0, tasks = 0;  // calls, and the tasks of all of them
  int workers = 0;               // the most that a walk had
  double wall_seconds = 0;       // of the walks: what surrounds them is the caller's
  std::vector<StepProfile> steps;
};

void start_profile();
std::vector<PlanProfile> stop_profile();  // in the order in which the plans ran first; empty where none was started

// The clocks of one walk's workers, added to the profile when the walk is over. While there is no profile it has none.
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
