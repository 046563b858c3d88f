// One Schedule as two. The slots that are filled before the cut and read behind it move into a task's tape, one array for each type:
//   gradient pass  z1 -> %3 ...                 first   z1 -> tape_made+64 ...
//   tangent pass   reads %3 ...           =>    second  reads tape+64 ...
// but what a pointwise function makes is made again behind the cut: that takes no longer than memory takes to hand it back, and tapes of
// many tasks are in no cache.
#include <algorithm>
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

// The slots that the Steps write before they read them.
std::vector<bool> made_slots(const std::vector<Step>& steps, size_t slots) {
  std::vector<bool> made(slots, false), seen(slots, false);
  for (const Step& step : steps)
    for (size_t i = 0; i < step.operand.size(); ++i) {
      if (!step.operand[i]) continue;
      const size_t slot = size_t(step.operand[i].slot);
      if (!seen[slot] && i < op_outputs(step.op)) made[slot] = true;
      seen[slot] = true;
    }
  return made;
}

// The second part, each pointwise Step of the first whose result it reads ahead of the first reader.
std::vector<Step> with_pointwise_again(const std::vector<Step>& first, std::vector<Step> second, const Schedule& whole) {
  for (size_t s = first.size(); s-- > 0;) {
    const Step& step = first[s];
    if (step.op != Op::pointwise_fwd && step.op != Op::pointwise_bwd) continue;
    const int made = step.operand[0].slot;
    if (whole.slots[size_t(made)].arg != Arg::none) continue;
    const auto writes = [&](const Step& other) {
      for (size_t i = 0; i < op_outputs(other.op); ++i)
        if (other.operand[i].slot == made) return true;
      return false;
    };
    const auto reads = [&](const Step& other) {
      return std::any_of(other.operand.begin(), other.operand.end(), [&](const Operand& o) { return o.slot == made; });
    };
    const auto reader = std::find_if(second.begin(), second.end(), reads);
    if (reader != second.end() && std::count_if(first.begin(), first.end(), writes) == 1) second.insert(reader, step);
  }
  return second;
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

SplitSchedule split(const Schedule& whole, size_t at) {
  const auto cut = whole.steps.begin() + std::ptrdiff_t(at);
  const std::vector<Step> first(whole.steps.begin(), cut);
  const std::vector<Step> second = with_pointwise_again(first, {cut, whole.steps.end()}, whole);
  const size_t slots = whole.slots.size();
  const std::vector<bool> before = used_slots(first, slots), behind = used_slots(second, slots), made = made_slots(second, slots);
  std::vector<std::optional<int64_t>> kept(slots);  // where in its tape
  std::vector<int64_t> sizes(size_t(Type::tap) + 1, 0);
  for (size_t slot = 0; slot < slots; ++slot) {
    if (whole.slots[slot].arg != Arg::none || !before[slot] || !behind[slot] || made[slot]) continue;
    int64_t& end = sizes[size_t(whole.slots[slot].type)];
    kept[slot] = end;
    end += (whole.slots[slot].size + kAlign - 1) / kAlign * kAlign;
  }
  return {part_of(whole, first, kept, sizes, false), part_of(whole, second, kept, sizes, true)};
}

}  // namespace fastmaml
