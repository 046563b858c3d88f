// How much a linearisation leaves for the products with its curvature.
#pragma once

#include "program/schedule.h"

namespace fastmaml {

struct TapeSizes {  // of a task, in elements
  int64_t real = 0, index = 0, tap = 0;
};

// Of a Schedule that writes or reads a tape.
TapeSizes tape_sizes(const Schedule& schedule);

}  // namespace fastmaml
