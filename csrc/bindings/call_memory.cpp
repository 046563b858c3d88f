#include "bindings/call_memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#include "ops/huge_pages.h"

namespace fastmaml {
namespace {

std::mutex idle_mutex;
std::vector<std::unique_ptr<Workplace>>& idle() {
  static auto* places = new std::vector<std::unique_ptr<Workplace>>;  // outlives calls made while the process ends
  return *places;
}

}  // namespace

void Workplace::Free::operator()(void* data) const { std::free(data); }

void* Workplace::take(size_t bytes) {
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

LentWorkplace::LentWorkplace() {
  const std::lock_guard<std::mutex> lock(idle_mutex);
  if (idle().empty()) {
    place_ = std::make_unique<Workplace>();
  } else {
    place_ = std::move(idle().back());
    idle().pop_back();
  }
}

LentWorkplace::~LentWorkplace() {
  place_->reset();
  const std::lock_guard<std::mutex> lock(idle_mutex);
  idle().push_back(std::move(place_));
}

MemoryHeld memory_held() {
  const std::lock_guard<std::mutex> lock(idle_mutex);
  MemoryHeld held;
  for (const auto& place : idle()) {
    held.allocations += place->allocations();
    held.high_water = std::max(held.high_water, place->arenas.high_water());
  }
  return held;
}

void release_memory() {
  const std::lock_guard<std::mutex> lock(idle_mutex);
  idle().clear();
}

}  // namespace fastmaml
