// Which slot lives where in the arena, and for how long: slots whose live ranges do not overlap share memory.
#pragma once

#include <cstddef>
#include <vector>

#include "program/schedule.h"

namespace fastmaml {

struct OpTable;

// A slot of the arena: how long it is alive, and where in the Schedule.
struct LiveRange {
  int slot;
  size_t bytes;     // rounded up to whole cache lines
  int first, last;  // Steps that use it
  bool overlaps(const LiveRange& other) const { return first <= other.last && other.first <= last; }
};
std::vector<LiveRange> live_ranges(const Schedule& schedule, size_t real_bytes);  // of the slots that some Step uses

// Memory in which slots that are not alive at the same time share their places.
class Packing {
 public:
  size_t put(const LiveRange& range);                                                      // at the lowest gap; returns its offset
  size_t end_of(const LiveRange& range) const { return lowest_gap(range) + range.bytes; }  // where put() would let it end
  size_t bytes() const { return bytes_; }

 private:
  struct Placed {
    LiveRange range;
    size_t offset;
  };
  std::vector<Placed> placed_;
  size_t bytes_ = 0;
  size_t lowest_gap(const LiveRange& range) const;
};
// The order that packs best. Long rows of equal slots (the phi[k]) stack without holes, so memory grows by exactly one of them per
// inner step.
void largest_first(std::vector<LiveRange>& ranges);

struct Workspace {
  std::vector<size_t> offset;  // bytes from the task's arena start, per slot; unused for slots that are arguments
  size_t task_bytes = 0;       // of all slots of one task
  size_t scratch_bytes = 0;    // the largest scratch of any Step; lies behind the slots
};

size_t element_bytes(Type type, size_t real_bytes);

// Throws std::invalid_argument, naming the op, when the table lacks one that the schedule uses.
Workspace plan_workspace(const Schedule& schedule, const OpTable& table);

}  // namespace fastmaml
