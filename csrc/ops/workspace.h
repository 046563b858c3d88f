// Where each slot lies in the arena. Slots whose live ranges do not overlap share memory.
#pragma once

#include <cstddef>
#include <vector>

#include "program/schedule.h"

namespace fastmaml {

struct OpTable;

// The live range of a slot: its size, and the first and last Step that use it.
struct LiveRange {
  int slot;
  size_t bytes;     // rounded up to whole cache lines
  int first, last;  // first and last Step that use it
  bool overlaps(const LiveRange& other) const { return first <= other.last && other.first <= last; }
};
std::vector<LiveRange> live_ranges(const Schedule& schedule, size_t real_bytes);  // of all slots that some Step uses

// A memory in which slots with disjoint live ranges share space.
class Packing {
 public:
  size_t put(const LiveRange& range);                                                      // at the lowest gap; returns the offset
  size_t end_of(const LiveRange& range) const { return lowest_gap(range) + range.bytes; }  // where put() would let the slot end
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
// The order that packs best. Equal slots (the phi[k]) stack without holes, so an inner step adds exactly one of them.
void largest_first(std::vector<LiveRange>& ranges);

struct Workspace {
  std::vector<size_t> offset;  // bytes from the task's arena start, per slot; unused for slots that are arguments
  size_t task_bytes = 0;       // of all slots of one task
  size_t scratch_bytes = 0;    // the largest scratch of any Step; lies after the slots
};

size_t element_bytes(Type type, size_t real_bytes);

// Throws std::invalid_argument with the op's name if the table lacks an op of the schedule.
Workspace plan_workspace(const Schedule& schedule, const OpTable& table);

}  // namespace fastmaml
