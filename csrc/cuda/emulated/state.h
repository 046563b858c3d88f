// The block that runs, as the files of the emulator share it. One launch at a time, so one of everything.
#pragma once

#include <bit>
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
  const Operation* waits;  // null: it runs, or could
  uint32_t mask;
  Where where;
  void* deposit;
  std::vector<AsyncCopy> copies;  // under way
  int64_t group;                  // of the next copy
};

struct Block {
  const Launch* launch = nullptr;
  const std::vector<Range>* static_shared = nullptr;  // the __shared__ variables that the kernel may use
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* running = nullptr;  // null: the scheduler
  size_t alive = 0, at_barrier = 0;
  size_t votes = 0, result = 0;  // of the threads at the barrier, of the barrier before
  Fiber scheduler;
  std::string failure;
  bool faulted = false;
  int64_t bytes_read = 0, bytes_written = 0;
};
extern Block block;
extern Stacks stacks;

// Ends the launch: launch() throws std::runtime_error with the kernel, the block, the thread and this sentence.
[[noreturn]] void fail(const std::string& sentence);
// The running thread waits for `operation`; returns when it was done. Lanes find their deposits in Thread::deposit.
void wait_warp(const Operation& operation, uint32_t mask, void* deposit, Where where);

std::string to_string(uint3 index);
std::string to_string(const Where& where);

// ---------------------------------------------------------------- what the race build hears

// A place in a kernel: an address in its code, or as the functions of CUDA are told it.
class Position {
 public:
  static Position of_code(const void* address) { return {reinterpret_cast<uint64_t>(address)}; }
  static Position of(const Where& where) { return {std::bit_cast<uint64_t>(where) | kWhere}; }
  std::string text() const;

  uint64_t bits = 0;

 private:
  static constexpr uint64_t kWhere = uint64_t(1) << 63;  // no address of a program has it
};

enum class Access { read, write, atomic, copy, land };  // cp.async: copy when it starts, land when it was waited for

class Watcher {
 public:
  virtual void begin_launch() = 0;
  virtual void begin_block() = 0;
  virtual void pass_barrier() = 0;
  virtual void sync_warp(uint32_t mask) = 0;
  virtual void access(Access access, const void* address, size_t bytes, Position position) = 0;  // of the running thread
};
extern Watcher* watcher;  // null outside the race build
extern bool counts_bytes_alone;

// ---------------------------------------------------------------- memory.cpp

void poison_shared(size_t dynamic_bytes);  // all bits one, before every block
void check_guards();                       // the bytes beside buffers and dynamic shared memory, which no page protects
void mend_guards();                        // after a launch that failed
void finish_copies();                      // none may be left when a thread returns

class FaultHandler {  // ends the launch that a thread's fault interrupts
 public:
  FaultHandler();
  ~FaultHandler();
};
std::string describe_fault();  // which has set block.faulted

// The buffer around an address, as far as it may be touched, or whole_page where it is none of ours.
Range buffer_near(const void* address, const Range& whole_page);
Range dynamic_range();          // the dynamic shared memory
Range dynamic_neighbourhood();  // and the guards around it

// ---------------------------------------------------------------- symbols.cpp

std::string kernel_symbol(const void* kernel);
// The __shared__ variables that the kernel may use, and the memory that holds all there are: of this thread of the host.
const std::vector<Range>& static_shared(const void* kernel);
Range static_neighbourhood();
Range image();                                   // code and static data of this program or library
std::string code_position(const void* address);  // file:line, where addr2line can tell

}  // namespace fastmaml::emu
