#include "program/schedule.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace fastmaml {

int Schedule::add_slot(int64_t size, Type type) {
  slots.push_back({size, type, Arg::none});
  return static_cast<int>(slots.size()) - 1;
}

Operand Schedule::external(Arg arg, int64_t size, Type type) {
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i].arg != arg) continue;
    slots[i].size = std::max(slots[i].size, size);
    return {static_cast<int>(i), 0};
  }
  slots.push_back({size, type, arg});
  return {static_cast<int>(slots.size()) - 1, 0};
}

int Schedule::add_layer(const Layer& layer) {
  layers.push_back(layer);
  return static_cast<int>(layers.size()) - 1;
}

void Schedule::step(Op op, const Layer& layer, int64_t examples, std::initializer_list<Operand> operands, int64_t stat_examples) {
  if (operands.size() > kMaxOperands) throw std::logic_error(std::string(op_name(op)) + ": more operands than a Step holds");
  Step s;
  s.op = op;
  s.phase = phase;
  s.layer = add_layer(layer);
  s.examples = examples;
  s.stat_examples = stat_examples ? stat_examples : examples;
  std::copy(operands.begin(), operands.end(), s.operand.begin());
  steps.push_back(s);
}

const char* phase_name(Phase phase) {
  constexpr const char* kNames[] = {"whole", "inner gradient", "update", "query", "sweep"};
  return kNames[static_cast<int>(phase)];
}

std::string to_string(const Schedule& schedule) {
  std::ostringstream out;
  for (const Step& step : schedule.steps) {
    out << op_name(step.op) << " N=" << step.examples;
    std::istringstream roles(op_roles(step.op));
    std::string role;
    for (int i = 0; roles >> role; ++i) {
      const Operand& operand = step.operand[i];
      out << "  " << role << '=';
      if (!operand) {
        out << '-';
        continue;
      }
      const Slot& slot = schedule.slots[operand.slot];
      if (slot.arg != Arg::none)
        out << arg_name(slot.arg);
      else
        out << '%' << operand.slot;
      if (operand.offset) out << '+' << operand.offset;
    }
    out << '\n';
  }
  return out.str();
}

}  // namespace fastmaml
