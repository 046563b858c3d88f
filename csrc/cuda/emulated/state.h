// The block that runs, as the files of the emulator share it. One launch at a time, so one of everything.
#pragma once

#include <string>
#include <vector>

#include "cuda/emulated/cuda_emu.h"
#include "cuda/emulated/emu.h"
#include "cuda/emulated/fibers.h"

namespace fastmaml::emu {

// What a thread waits for, named as in CUDA. A warp operation runs once for all lanes of its mask, when the last of them arrives.
struct Thread;
struct Operation {
  const char* name;
  void (*run)(Thread* lanes, uint32_t mask);  // null: a barrier of the block
};

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  int64_t group;
  Where where;
};

struct Warp {
  uint32_t lanes = 0, ready = 0, returned = 0;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int number, lane;
  Warp* warp;
  const Operation* waits;  // null: it runs, or could
  uint32_t mask;
  Where where;
  void* deposit;
  std::vector<AsyncCopy> copies;  // under way
  int64_t group;                  // of the next copy
};

struct Block {
  const Launch* launch = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* running = nullptr;  // null: the scheduler
  size_t alive = 0, at_barrier = 0, votes = 0, result = 0;
  Fiber scheduler;
  std::string failure;
  bool faulted = false;
};
extern Block block;
extern Stacks stacks;

// Ends the launch: launch() throws std::runtime_error with the kernel, the block, the thread and this sentence.
[[noreturn]] void fail(const std::string& sentence);
// The running thread waits for `operation`; returns when it was done. Lanes find their deposits in Thread::deposit.
void wait_warp(const Operation& operation, uint32_t mask, void* deposit, Where where);

std::string to_string(uint3 index);
std::string to_string(const Where& where);

// ---------------------------------------------------------------- memory.cpp

void poison_shared(size_t dynamic_bytes);  // all bits one, before every block
void check_guards();                       // the bytes beside buffers and dynamic shared memory, which no page protects
void finish_copies();                      // none may be left when a thread returns
class FaultHandler {                       // turns a fault of a thread into fail()
 public:
  FaultHandler();
  ~FaultHandler();
};
std::string describe_fault();  // which has set block.faulted

// ---------------------------------------------------------------- symbols.cpp

struct Range {
  unsigned char* low;
  size_t bytes;
};
std::string kernel_symbol(const void* kernel);
const std::vector<Range>& static_shared(const void* kernel);  // the __shared__ variables that it may use, of this thread of the host
std::string readable(const std::string& symbol);              // without namespaces and parameters
std::string code_position(const void* address);

}  // namespace fastmaml::emu
