// The size of a linearisation's tape.
#pragma once

#include "program/schedule.h"

namespace fastmaml {

struct TapeSizes {  // elements for one task
  int64_t real = 0, index = 0, tap = 0;
};

// schedule: one part of a split Schedule, which writes or reads a tape.
TapeSizes tape_sizes(const Schedule& schedule);

}  // namespace fastmaml
