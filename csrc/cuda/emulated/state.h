// The running block, shared by the emulator's files. Launches run one at a time, so there is one of everything.
#pragma once

#include <bit>
#include <string>
#include <vector>

#include "cuda/emulated/cuda_emu.h"
#include "cuda/emulated/emu.h"
#include "cuda/emulated/fibers.h"

namespace fastmaml::emu {

// What a thread waits for, named as in CUDA. The last lane of the mask to arrive runs a warp operation for all lanes.
struct Thread;
struct Operation {
  const char* name;
  void (*run)(Thread* lanes, uint32_t mask);  // null: the block's barrier
};

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  int64_t group;
  Where where;
};

struct Range {
  const unsigned char* low = nullptr;
  size_t bytes = 0;
  const char* name = "";

  bool holds(const void* address, size_t n = 1) const {
    return low <= address && static_cast<const unsigned char*>(address) + n <= low + bytes;
  }
};

struct Warp {
  uint32_t lanes = 0, ready = 0, returned = 0;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int number, lane;
  Warp* warp;
  const Operation* waits;  // null: it runs, or could run
  uint32_t mask;
  Where where;
  void* deposit;
  std::vector<AsyncCopy> copies;  // in flight
  int64_t group;                  // group of the next copy
};

struct Block {
  const Launch* launch = nullptr;
  const std::vector<Range>* static_shared = nullptr;  // the kernel's __shared__ variables
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* running = nullptr;  // null: the scheduler runs
  size_t alive = 0, at_barrier = 0;
  size_t votes = 0, result = 0;  // votes: threads at this barrier; result: of the last barrier
  Fiber scheduler;
  std::string failure;
  bool faulted = false;
  int64_t bytes_read = 0, bytes_written = 0;
};
extern Block block;
extern Stacks stacks;

// Ends the launch: launch() throws std::runtime_error with the kernel, the block, the thread and this sentence.
[[noreturn]] void fail(const std::string& sentence);
// The running thread waits for `operation`; returns when it is done. Lanes find their deposits in Thread::deposit.
void wait_warp(const Operation& operation, uint32_t mask, void* deposit, Where where);

std::string to_string(uint3 index);
std::string to_string(const Where& where);

// ---------------------------------------------------------------- what the race build hears

// A place in a kernel: an address of code, or a source location as passed to CUDA's functions.
class Position {
 public:
  static Position of_code(const void* address) { return {reinterpret_cast<uint64_t>(address)}; }
  static Position of(const Where& where) { return {std::bit_cast<uint64_t>(where) | kWhere}; }
  std::string text() const;

  uint64_t bits = 0;

 private:
  static constexpr uint64_t kWhere = uint64_t(1) << 63;  // no program address has this bit
};

enum class Access { read, write, atomic, copy, land };  // cp.async: copy when it starts, land when its wait is over

class Watcher {
 public:
  virtual void begin_launch() = 0;
  virtual void begin_block() = 0;
  virtual void pass_barrier() = 0;
  virtual void sync_warp(uint32_t mask) = 0;
  virtual void access(Access access, const void* address, size_t bytes, Position position) = 0;  // by the running thread
};
extern Watcher* watcher;  // null, except in the race build
extern bool counts_bytes_alone;

// ---------------------------------------------------------------- memory.cpp

void poison_shared(size_t dynamic_bytes);  // all bits one, before every block
void check_guards();                       // the bytes around buffers and dynamic shared memory that no page protects
void mend_guards();                        // after a launch that failed
void finish_copies();                      // none may be left when a thread returns

class FaultHandler {  // ends the launch when a thread faults
 public:
  FaultHandler();
  ~FaultHandler();
};
std::string describe_fault();  // after a fault has set block.faulted

// The accessible range of the buffer around an address, or whole_page if no buffer of ours is there.
Range buffer_near(const void* address, const Range& whole_page);
Range dynamic_range();          // the dynamic shared memory
Range dynamic_neighbourhood();  // with the guards around it

// ---------------------------------------------------------------- symbols.cpp

std::string kernel_symbol(const void* kernel);
// The kernel's __shared__ variables, and the memory that holds all of them. Each host thread has its own.
const std::vector<Range>& static_shared(const void* kernel);
Range static_neighbourhood();
Range image();                                   // code and static data of this program or library
std::string code_position(const void* address);  // file:line, if addr2line knows

}  // namespace fastmaml::emu
