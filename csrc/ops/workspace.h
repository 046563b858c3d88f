// Which slot lives where in the arena, and for how long: slots whose lives do not overlap share memory.
#pragma once

#include <cstddef>
#include <vector>

#include "program/schedule.h"

namespace fastmaml {

struct OpTable;

struct Workspace {
  std::vector<size_t> offset;  // bytes from the task's arena start, per slot; unused for slots that are arguments
  size_t task_bytes = 0;       // of all slots of one task
  size_t scratch_bytes = 0;    // the largest scratch of any Step; lies behind the slots
};

size_t element_bytes(Type type, size_t real_bytes);

// Throws std::invalid_argument, naming the op, when the table lacks one that the schedule uses.
Workspace plan_workspace(const Schedule& schedule, const OpTable& table);

}  // namespace fastmaml
