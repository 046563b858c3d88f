// Takes the examples of a small network a few at a time through all its layers, so that activations stay in cache.
#pragma once

#include "program/schedule.h"

namespace fastmaml {

struct ChunkSizes {  // in numbers
  int64_t cached;    // what fits the cache: smaller runs of Steps stay whole, and a chunk should touch half as much
};

// Returns the same work with runs of per-example Steps (linear, pointwise, losses) walked chunk by chunk.
// The choice of runs and the rows of a chunk depend on the network and N alone, because they set the order of sums.
Schedule chunk_examples(const Schedule& schedule, const ChunkSizes& sizes);

}  // namespace fastmaml
