#include "ops/workspace.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "ops/ops.h"

namespace fastmaml {
namespace {

constexpr size_t kAlign = 64;  // a cache line, also the width of the widest vector

size_t round_up(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

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
  throw std::logic_error("not a type of numbers");
}

std::vector<LiveRange> live_ranges(const Schedule& schedule, size_t real_bytes) {
  std::vector<LiveRange> ranges(schedule.slots.size());
  for (size_t i = 0; i < schedule.slots.size(); ++i)
    ranges[i] = {int(i), round_up(size_t(schedule.slots[i].size) * element_bytes(schedule.slots[i].type, real_bytes)), -1, -1};
  for (size_t s = 0; s < schedule.steps.size(); ++s)
    for (const Operand& operand : schedule.steps[s].operand) {
      if (!operand) continue;
      LiveRange& range = ranges[operand.slot];
      if (range.first < 0) range.first = int(s);
      range.last = int(s);
    }
  std::erase_if(ranges,
                [&](const LiveRange& range) { return range.first < 0 || range.bytes == 0 || schedule.slots[range.slot].arg != Arg::none; });
  return ranges;
}

size_t Packing::lowest_gap(const LiveRange& range) const {
  std::vector<const Placed*> alive;
  for (const Placed& placed : placed_)
    if (placed.range.overlaps(range)) alive.push_back(&placed);
  std::sort(alive.begin(), alive.end(), [](const Placed* a, const Placed* b) { return a->offset < b->offset; });
  size_t at = 0;
  for (const Placed* other : alive) {
    if (other->offset >= at + range.bytes) break;
    at = std::max(at, other->offset + other->range.bytes);
  }
  return at;
}

size_t Packing::put(const LiveRange& range) {
  const size_t at = lowest_gap(range);
  placed_.push_back({range, at});
  bytes_ = std::max(bytes_, at + range.bytes);
  return at;
}

void largest_first(std::vector<LiveRange>& ranges) {
  std::stable_sort(ranges.begin(), ranges.end(), [](const LiveRange& a, const LiveRange& b) { return a.bytes > b.bytes; });
}

Workspace plan_workspace(const Schedule& schedule, const OpTable& table) {
  Workspace plan;
  for (const Step& step : schedule.steps) {
    if (!is_python_loss(step.op) && !table.supports(step.op))
      throw std::invalid_argument(std::string("backend ") + table.backend + " has no op " + op_name(step.op));
    const Layer& layer = schedule.layers[size_t(step.layer)];
    if (!table.rectifies && (rectified_output(layer).on || rectified_input(layer).on))
      throw std::invalid_argument(std::string("backend ") + table.backend + " takes no rectifier into " + op_name(step.op));
    const Linear* linear = std::get_if<Linear>(&layer);
    if (linear && linear->out_in != table.out_in && table.lanes != kAnyLanes)
      throw std::invalid_argument(std::string("backend ") + table.backend + " reads weights of " + op_name(step.op) + " as " +
                                  (table.out_in ? "[out, in]" : "[in, out]"));
    if (ScratchFn scratch = table.scratch[static_cast<int>(step.op)])
      plan.scratch_bytes = std::max(plan.scratch_bytes, round_up(scratch(step, layer)));
  }
  std::vector<LiveRange> ranges = live_ranges(schedule, table.real_bytes);
  largest_first(ranges);
  plan.offset.assign(schedule.slots.size(), 0);
  Packing arena;
  for (const LiveRange& range : ranges) plan.offset[range.slot] = arena.put(range);
  plan.task_bytes = arena.bytes();
  return plan;
}

}  // namespace fastmaml
