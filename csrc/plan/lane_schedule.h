// A Schedule for a walk with lanes.
#pragma once

#include "program/schedule.h"

namespace fastmaml {

// The same work on slots of the arena alone, which a walk keeps with a task in each lane: an argument is copied to such a slot before the
// first Step that uses it, a result from there after the last one, and only `copy` sees both layouts. Labels stay as they are, and so does
// what all tasks share by its nature (rates, mask, lam, weights of losses and other settings).
Schedule lane_schedule(Schedule schedule);

}  // namespace fastmaml
