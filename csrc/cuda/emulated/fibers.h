// Fibers: a stack each, switched by hand. A switch is eight instructions on x86-64; elsewhere ucontext does it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>
#if defined(__x86_64__) && !defined(FASTMAML_UCONTEXT)
#define FASTMAML_SWITCH_BY_HAND
#else
#include <ucontext.h>
#endif

namespace fastmaml::emu {

struct Fiber {
#ifdef FASTMAML_SWITCH_BY_HAND
  void* stack_pointer;
#else
  ucontext_t context;
#endif
};

void switch_fiber(Fiber& from, Fiber& to);

// Stacks that outlive launches, with an inaccessible page below each.
class Stacks {
 public:
  struct Range {
    std::byte *low, *high;
    bool holds(const void* address) const { return low <= address && address < high; }
  };
  static constexpr size_t kGuard = 4096, kBytes = 128 * 1024;

  void reserve(size_t count);
  const Range& operator[](size_t i) const { return stacks_[i]; }
  size_t size() const { return stacks_.size(); }
  bool hold(const void* address) const {
    return std::any_of(stacks_.begin(), stacks_.end(), [=](const Range& range) { return range.holds(address); });
  }
  // `fiber` will start with entry(), which never returns, on stack i.
  void prepare(Fiber& fiber, size_t i, void (*entry)()) const;

 private:
  std::vector<Range> stacks_;
};

}  // namespace fastmaml::emu
