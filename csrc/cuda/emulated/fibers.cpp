#include "cuda/emulated/fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifdef FASTMAML_SWITCH_BY_HAND
asm(R"(
.text
.p2align 4
.hidden fastmaml_emu_switch
.globl fastmaml_emu_switch
.type fastmaml_emu_switch, @function
fastmaml_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastmaml_emu_switch, .-fastmaml_emu_switch
)");
extern "C" void fastmaml_emu_switch(void** from, void* to);
#endif

namespace fastmaml::emu {

void Stacks::reserve(size_t count) {
  while (stacks_.size() < count) {
    constexpr size_t kMany = 64;  // stacks in one mapping
    void* mapped = mmap(nullptr, kMany * (kGuard + kBytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    std::byte* at = static_cast<std::byte*>(mapped);
    for (size_t i = 0; i < kMany; ++i, at += kGuard + kBytes) {
      mprotect(at, kGuard, PROT_NONE);
      stacks_.push_back({at + kGuard, at + kGuard + kBytes});
    }
  }
}

void Stacks::prepare(Fiber& fiber, size_t i, void (*entry)()) const {
  // Shifts each stack by a few cache lines. Stacks that start at the same place of their pages would share the same cache sets.
  std::byte* top = stacks_[i].high - i * 17 % 64 * 64;
#ifdef FASTMAML_SWITCH_BY_HAND
  uintptr_t* words = reinterpret_cast<uintptr_t*>(top) - 8;
  words[6] = reinterpret_cast<uintptr_t>(entry);  // below six saved registers; after ret the stack is as after a call
  words[7] = 0;
  fiber.stack_pointer = words;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks_[i].low;
  fiber.context.uc_stack.ss_size = static_cast<size_t>(top - stacks_[i].low);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
#ifdef FASTMAML_SWITCH_BY_HAND
  fastmaml_emu_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

}  // namespace fastmaml::emu
