#include "plan/profile.h"

#include <algorithm>
#include <atomic>
#include <mutex>

namespace fastmaml {
namespace {

struct Counted {
  PlanProfile profile;
  std::vector<StepTime> times;
};

struct Profiler {
  std::atomic<bool> on{false};
  std::mutex mutex;
  std::vector<Counted> plans;
};

Profiler& profiler() {
  static auto* one = new Profiler;  // never destroyed: calls may still run while the process ends
  return *one;
}

Counted& counted(Profiler& all, const std::shared_ptr<const Plan>& plan) {
  const auto found = std::find_if(all.plans.begin(), all.plans.end(), [&](const Counted& c) { return c.profile.plan == plan; });
  if (found != all.plans.end()) return *found;
  Counted fresh;
  fresh.profile.plan = plan;
  fresh.times.resize(plan->schedule.steps.size());
  return all.plans.emplace_back(std::move(fresh));
}

}  // namespace

void start_profile() {
  Profiler& all = profiler();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.plans.clear();
  all.on = true;
}

std::vector<PlanProfile> stop_profile() {
  Profiler& all = profiler();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.on = false;
  std::vector<PlanProfile> result;
  for (Counted& c : all.plans) {
    for (const StepTime& time : c.times) c.profile.steps.push_back({1e-9 * double(time.ns), time.calls, 1e-9 * double(time.least)});
    result.push_back(std::move(c.profile));
  }
  all.plans.clear();
  return result;
}

WalkClocks::WalkClocks(std::shared_ptr<const Plan> plan, int workers, int64_t tasks) : plan_(std::move(plan)), tasks_(tasks) {
  if (!profiler().on) return;
  clocks_.assign(size_t(std::max(workers, 1)), StepClock(plan_->schedule.steps.size()));
  start_ = nanoseconds();
}

WalkClocks::~WalkClocks() {
  if (clocks_.empty()) return;
  const double wall = 1e-9 * double(nanoseconds() - start_);
  Profiler& all = profiler();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (!all.on) return;
  Counted& c = counted(all, plan_);
  ++c.profile.walks;
  c.profile.tasks += tasks_;
  c.profile.workers = std::max(c.profile.workers, int(clocks_.size()));
  c.profile.wall_seconds += wall;
  for (const StepClock& clock : clocks_)
    for (size_t s = 0; s < c.times.size(); ++s) c.times[s] += clock.times()[s];
}

}  // namespace fastmaml
