#include "plan/lane_schedule.h"

#include <vector>

namespace fastmaml {
namespace {

// Every other argument needs a copy in the lanes' layout, because tasks do not share it.
bool shared_by_nature(Arg arg) {
  switch (arg) {
    case Arg::rates:
    case Arg::loss_weights:
    case Arg::step_rows:
    case Arg::lam:
    case Arg::mask:
    case Arg::step_count:
    case Arg::cg_settings:
      return true;
    default:
      return false;
  }
}

struct Moved {  // an argument that gets a slot in the arena
  int slot = -1;
  size_t first = 0, last = 0;  // Steps that use it
  explicit operator bool() const { return slot >= 0; }
};

}  // namespace

Schedule lane_schedule(Schedule schedule) {
  const std::vector<Step> steps = std::move(schedule.steps);
  std::vector<Moved> moved(schedule.slots.size());
  for (const Step& step : steps)
    for (const Operand& operand : step.operand) {
      if (!operand || moved[operand.slot]) continue;
      const Slot slot = schedule.slots[operand.slot];
      if (slot.arg == Arg::none || slot.type != Type::real || shared_by_nature(slot.arg) || step.op == Op::copy) continue;
      moved[operand.slot].slot = schedule.add_slot(slot.size);
    }
  for (size_t s = steps.size(); s-- > 0;)
    for (const Operand& operand : steps[s].operand)
      if (operand) moved[operand.slot].first = s;
  for (size_t s = 0; s < steps.size(); ++s)
    for (const Operand& operand : steps[s].operand)
      if (operand) moved[operand.slot].last = s;

  schedule.steps.clear();
  const auto copy = [&](int to, int from) { schedule.step(Op::copy, Vector{schedule.slots[from].size}, 1, {{to, 0}, {from, 0}}); };
  for (size_t s = 0; s < steps.size(); ++s) {
    Step step = steps[s];
    schedule.phase = step.phase;
    std::vector<int> results;
    for (Operand& operand : step.operand) {
      if (!operand || !moved[operand.slot]) continue;
      const int arg = operand.slot;
      Moved& to = moved[arg];
      const bool result = schedule.slots[arg].arg >= Arg::loss;
      if (to.first == s && !result) copy(to.slot, arg);
      to.first = steps.size();  // a Step may name the argument twice
      if (to.last == s && result) results.push_back(arg);
      operand.slot = to.slot;
    }
    schedule.steps.push_back(step);
    for (const int arg : results) {
      if (moved[arg].last == s) copy(arg, moved[arg].slot);
      moved[arg].last = steps.size();
    }
  }
  return schedule;
}

}  // namespace fastmaml
