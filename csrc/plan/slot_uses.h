// How often the Steps of a Schedule use each slot.
#pragma once

#include <vector>

#include "program/schedule.h"

namespace fastmaml {

// For each slot: how many operands name it.
inline std::vector<int> uses_of_slots(const std::vector<Step>& steps, size_t slots) {
  std::vector<int> uses(slots, 0);
  for (const Step& step : steps)
    for (const Operand& operand : step.operand)
      if (operand) ++uses[size_t(operand.slot)];
  return uses;
}

}  // namespace fastmaml
