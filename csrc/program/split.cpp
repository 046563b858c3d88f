// One Schedule as two. The slots that are filled before the cut and read behind it move into a task's tape, one array for each type:
//   gradient pass  y1 -> %3 ...                 first   y1 -> tape_made+64 ...
//   tangent pass   reads %3 ...           =>    second  reads tape+64 ...
#include <optional>
#include <stdexcept>

#include "program/schedule.h"

namespace fastmaml {
namespace {

constexpr int64_t kAlign = 64;  // elements: whole cache lines, whatever they hold

struct Ends {  // of a type's tape
  Arg made, read;
};

Ends ends_of(Type type) {
  switch (type) {
    case Type::real:
      return {Arg::tape_made, Arg::tape};
    case Type::index:
      return {Arg::tape_index_made, Arg::tape_index};
    case Type::tap:
      return {Arg::tape_tap_made, Arg::tape_tap};
    case Type::label:
      break;
  }
  throw std::logic_error("labels are the caller's, no Step leaves any");
}

std::vector<bool> used_slots(const std::vector<Step>& steps, size_t slots) {
  std::vector<bool> used(slots, false);
  for (const Step& step : steps)
    for (const Operand& operand : step.operand)
      if (operand) used[operand.slot] = true;
  return used;
}

// The Steps with the kept slots in their tape; an argument that none of them uses is asked of nobody.
Schedule part_of(const Schedule& whole, std::vector<Step> steps, const std::vector<std::optional<int64_t>>& kept,
                 const std::vector<int64_t>& sizes, bool second) {
  Schedule out{whole.slots, whole.layers, std::move(steps)};
  for (Step& step : out.steps)
    for (size_t i = 0; i < step.operand.size(); ++i) {
      Operand& operand = step.operand[i];
      if (!operand || !kept[operand.slot]) continue;
      if (second && i < op_outputs(step.op))
        throw std::logic_error(std::string(op_name(step.op)) + " would write into a tape that is kept");
      const Type type = whole.slots[operand.slot].type;
      const Ends ends = ends_of(type);
      const int64_t at = *kept[operand.slot] + operand.offset;
      operand = out.external(second ? ends.read : ends.made, sizes[size_t(type)], type);
      operand.offset = at;
    }
  const std::vector<bool> used = used_slots(out.steps, out.slots.size());
  for (size_t slot = 0; slot < out.slots.size(); ++slot)
    if (!used[slot]) out.slots[slot].size = 0;
  return out;
}

}  // namespace

Parts split(const Schedule& whole, size_t at) {
  const auto cut = whole.steps.begin() + std::ptrdiff_t(at);
  std::vector<Step> first(whole.steps.begin(), cut), second(cut, whole.steps.end());
  const size_t slots = whole.slots.size();
  const std::vector<bool> before = used_slots(first, slots), behind = used_slots(second, slots);
  std::vector<std::optional<int64_t>> kept(slots);  // where in its tape
  std::vector<int64_t> sizes(size_t(Type::tap) + 1, 0);
  for (size_t slot = 0; slot < slots; ++slot) {
    if (whole.slots[slot].arg != Arg::none || !before[slot] || !behind[slot]) continue;
    int64_t& end = sizes[size_t(whole.slots[slot].type)];
    kept[slot] = end;
    end += (whole.slots[slot].size + kAlign - 1) / kAlign * kAlign;
  }
  return {part_of(whole, std::move(first), kept, sizes, false), part_of(whole, std::move(second), kept, sizes, true)};
}

}  // namespace fastmaml
