// Rewrites a Schedule for a walk with lanes.
#pragma once

#include "program/schedule.h"

namespace fastmaml {

// Returns the same work on slots of the arena, where a walk keeps a task in each lane.
// An argument is copied to a slot before the first Step that uses it. A result is copied from a slot after the last one.
// Only `copy` sees both layouts. Labels and arguments that all tasks share (rates, mask, lam, weights of losses) stay as they are.
Schedule lane_schedule(Schedule schedule);

}  // namespace fastmaml
