// The order in which a Schedule is rewritten before it runs.
#pragma once

#include <functional>

#include "ops/ops.h"
#include "program/schedule.h"

namespace fastmaml {

// Told after each stage that the table takes part in: the stage's name and what it has left.
using AfterStage = std::function<void(const char* stage, const Schedule& schedule)>;

// The same work as the table's backend runs it. The stages, in this order:
//   fuse            Steps that touch the same numbers become one
//   stream          host: gradients by large images are made and used up a few images at a time
//   chunk_examples  host, one task after the other: many examples of a small network take all layers a few at a time
//   lane_schedule   host, tasks side by side: arguments are copied to slots with a task in each lane, and results back
//   fuse_updates    plain descent's updates are made by the products they read; not those whose gradients chunks add up
Schedule rewritten(Schedule schedule, const OpTable& table, const AfterStage& after = {});

}  // namespace fastmaml
