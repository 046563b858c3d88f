#include "bindings/call_memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#include "ops/huge_pages.h"

namespace fastmaml {
namespace {

std::mutex idle_mutex;
std::vector<std::unique_ptr<CallMemory>>& idle() {
  static auto* memories = new std::vector<std::unique_ptr<CallMemory>>;  // never destroyed: calls may still run while the process ends
  return *memories;
}

}  // namespace

void CallMemory::Free::operator()(void* data) const { std::free(data); }

void* CallMemory::take(size_t bytes) {
  bytes = std::max<size_t>((bytes + 63) / 64 * 64, 64);
  if (taken_ == blocks_.size()) blocks_.emplace_back();
  Block& block = blocks_[taken_++];
  if (block.bytes < bytes) {
    block.bytes = 0;
    block.data.reset();
    block.data.reset(std::aligned_alloc(64, bytes));
    if (!block.data) throw std::bad_alloc();
    ask_for_huge_pages(block.data.get(), bytes);
    block.bytes = bytes;
    ++block_allocations_;
  }
  return block.data.get();
}

CallMemoryLease::CallMemoryLease() {
  const std::lock_guard<std::mutex> lock(idle_mutex);
  if (idle().empty()) {
    memory_ = std::make_unique<CallMemory>();
  } else {
    memory_ = std::move(idle().back());
    idle().pop_back();
  }
}

CallMemoryLease::~CallMemoryLease() {
  memory_->reset();
  const std::lock_guard<std::mutex> lock(idle_mutex);
  idle().push_back(std::move(memory_));
}

MemoryHeld memory_held() {
  const std::lock_guard<std::mutex> lock(idle_mutex);
  MemoryHeld held;
  for (const auto& memory : idle()) {
    held.allocations += memory->allocations();
    held.high_water = std::max(held.high_water, memory->arenas.high_water());
  }
  return held;
}

void release_memory() {
  const std::lock_guard<std::mutex> lock(idle_mutex);
  idle().clear();
}

}  // namespace fastmaml
