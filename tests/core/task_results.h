// What a walk over a batch of tasks wrote, and whether a task's numbers depend on the others of its batch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace fastmaml {

using Results = std::vector<std::vector<double>>;  // by Arg, task after task

inline bool last_task_is(const Results& all, const Results& alone) {
  for (size_t a = 0; a < all.size(); ++a)
    if (!std::equal(alone[a].begin(), alone[a].end(), all[a].end() - std::ptrdiff_t(alone[a].size()))) return false;
  return true;
}

}  // namespace fastmaml
