#include "bindings/profile_rows.h"

#include <pybind11/stl.h>

#include "plan/cost.h"

namespace fastmaml {
namespace {

pybind11::dict row(const Plan& plan, const Step& step) {
  const Layer& layer = plan.schedule.layers[size_t(step.layer)];
  const Cost cost = cost_of(step, layer, plan.table->real_bytes);
  pybind11::dict row;
  row["phase"] = phase_name(step.phase);
  row["op"] = op_name(step.op);
  row["layer"] = words_of(layer);
  row["examples"] = step.examples;
  row["sizes"] = sizes_of(step, layer);
  row["products"] = cost.products;
  row["other"] = cost.other;
  row["bytes"] = cost.bytes;
  return row;
}

pybind11::dict facts(const Plan& plan) {
  pybind11::dict facts;
  facts["memory"] = plan.memory == Memory::stash ? "stash" : "low";
  facts["lanes"] = plan.lanes();
  facts["arena_bytes"] = plan.arena_bytes();
  facts["as_torch"] = plan.as_torch();
  return facts;
}

}  // namespace

pybind11::dict cost_rows(const Plan& plan) {
  pybind11::list steps;
  for (const Step& step : plan.schedule.steps) steps.append(row(plan, step));
  pybind11::dict costs = facts(plan);
  costs["steps"] = steps;
  return costs;
}

pybind11::list profile_rows() {
  pybind11::list plans;
  for (const PlanProfile& profile : stop_profile()) {
    pybind11::list steps;
    for (size_t s = 0; s < profile.steps.size(); ++s) {
      pybind11::dict step = row(*profile.plan, profile.plan->schedule.steps[s]);
      step["calls"] = profile.steps[s].calls;
      step["seconds"] = profile.steps[s].seconds;
      step["least_seconds"] = profile.steps[s].least_seconds;
      steps.append(step);
    }
    pybind11::dict plan = facts(*profile.plan);
    plan["walks"] = profile.walks;
    plan["tasks"] = profile.tasks;
    plan["workers"] = profile.workers;
    plan["wall_seconds"] = profile.wall_seconds;
    plan["steps"] = steps;
    plans.append(plan);
  }
  return plans;
}

}  // namespace fastmaml
