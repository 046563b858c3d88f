// Many examples of a network with few parameters, taken a few at a time through all its layers.
#pragma once

#include "program/schedule.h"

namespace fastmaml {

struct ChunkSizes {  // in numbers
  int64_t cached;    // what stays in cache: a row of Steps that touches no more is left as it is, and a chunk is to touch half of it
};

// The same work with runs of per-example Steps (linear, pointwise, losses) walked chunk by chunk. Which runs, and the rows of a chunk,
// follow from the network and N alone: the order of a sum depends on them.
Schedule chunk_examples(const Schedule& schedule, const ChunkSizes& sizes);

}  // namespace fastmaml
