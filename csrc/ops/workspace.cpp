#include "ops/workspace.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "ops/ops.h"

namespace fastmaml {
namespace {

constexpr size_t kAlign = 64;  // a cache line, and the widest vector

size_t round_up(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

struct Life {
  int slot;
  size_t bytes;
  int first, last;  // Steps
};

}  // namespace

size_t element_bytes(Type type, size_t real_bytes) {
  switch (type) {
    case Type::real:
      return real_bytes;
    case Type::index:
      return sizeof(int32_t);
    case Type::label:
      return sizeof(int64_t);
    case Type::tap:
      return sizeof(int8_t);
  }
  return 0;
}

Workspace plan_workspace(const Schedule& schedule, const OpTable& table) {
  Workspace plan;
  std::vector<Life> lives(schedule.slots.size());
  for (size_t i = 0; i < schedule.slots.size(); ++i)
    lives[i] = {int(i), round_up(schedule.slots[i].size * element_bytes(schedule.slots[i].type, table.real_bytes)), -1, -1};
  for (size_t s = 0; s < schedule.steps.size(); ++s) {
    const Step& step = schedule.steps[s];
    if (!is_callers(step.op) && !table.supports(step.op))
      throw std::invalid_argument(std::string("backend ") + table.backend + " has no op " + op_name(step.op));
    if (ScratchFn scratch = table.scratch[static_cast<int>(step.op)])
      plan.scratch_bytes = std::max(plan.scratch_bytes, round_up(scratch(step, schedule.layers[step.layer])));
    for (const Operand& operand : step.operand) {
      if (!operand) continue;
      Life& life = lives[operand.slot];
      if (life.first < 0) life.first = int(s);
      life.last = int(s);
    }
  }

  // Largest first, each at the lowest gap between the slots that are alive at the same time. Long rows of equal slots (the
  // phi[k]) stack without holes, so memory grows by exactly one of them per inner step.
  std::vector<Life> order;
  for (const Life& life : lives)
    if (life.first >= 0 && life.bytes > 0 && schedule.slots[life.slot].arg == Arg::none) order.push_back(life);
  std::stable_sort(order.begin(), order.end(), [](const Life& a, const Life& b) { return a.bytes > b.bytes; });
  plan.offset.assign(schedule.slots.size(), 0);
  std::vector<const Life*> alive;
  for (size_t i = 0; i < order.size(); ++i) {
    const Life& life = order[i];
    alive.clear();
    for (size_t j = 0; j < i; ++j)
      if (order[j].first <= life.last && life.first <= order[j].last) alive.push_back(&order[j]);
    std::sort(alive.begin(), alive.end(), [&](const Life* a, const Life* b) { return plan.offset[a->slot] < plan.offset[b->slot]; });
    size_t at = 0;
    for (const Life* other : alive) {
      if (plan.offset[other->slot] >= at + life.bytes) break;
      at = std::max(at, plan.offset[other->slot] + other->bytes);
    }
    plan.offset[life.slot] = at;
    plan.task_bytes = std::max(plan.task_bytes, at + life.bytes);
  }
  return plan;
}

}  // namespace fastmaml
