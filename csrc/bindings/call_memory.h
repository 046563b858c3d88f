// Memory that outlives calls, so that repeated calls allocate nothing. All of it is thread-safe.
#pragma once

#include <memory>
#include <vector>

#include "ops/ops.h"

namespace fastmaml {

// The memory of one call: an arena for each worker, and blocks for arrays between torch's layout and the engine's.
class CallMemory {
 public:
  Arenas arenas;
  void* take(size_t bytes);  // 64-byte aligned; valid until reset
  void reset() { taken_ = 0; }
  int64_t allocations() const { return arenas.allocations() + block_allocations_; }

 private:
  struct Free {
    void operator()(void* data) const;
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    size_t bytes = 0;
  };
  std::vector<Block> blocks_;
  size_t taken_ = 0;
  int64_t block_allocations_ = 0;
};

// Lends a CallMemory for one call, the last returned first. Simultaneous calls never share one.
class CallMemoryLease {
 public:
  CallMemoryLease();
  ~CallMemoryLease();
  CallMemoryLease(const CallMemoryLease&) = delete;
  CallMemoryLease& operator=(const CallMemoryLease&) = delete;
  CallMemory* operator->() const { return memory_.get(); }

 private:
  std::unique_ptr<CallMemory> memory_;
};

// The memory that the CallMemories hold between calls.
struct MemoryHeld {
  int64_t allocations = 0;  // allocations since the process began
  size_t high_water = 0;    // bytes of the largest arena of one worker
};
MemoryHeld memory_held();
void release_memory();  // gives it back to the system; the next call allocates again

}  // namespace fastmaml
