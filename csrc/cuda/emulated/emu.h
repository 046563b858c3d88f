// The emulator's interface for tests and bindings: order of threads, guarded buffers, launch counts. Kernels use cuda_emu.h.
//
// A wrong launch throws std::runtime_error with the kernel, the block, the thread and one sentence. Every build finds:
//   deadlocks, divergent barriers, and masks that name lanes that have returned
//   accesses outside of allocate()'s buffers or of dynamic shared memory, and indices outside of arrays
//   misaligned vectors, and cp.async without a wait (the values are NaN until then)
// The race build also finds races, and touches of cp.async's target before its wait.
// No build sees the rounding of fast intrinsics, the weak order of memory, coalescing or registers.
// Not found: a pointer that leaves one __shared__ array for its neighbour, and an endless loop.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace fastmaml::emu {

// The order of blocks, and of a block's threads between two barriers.
// The environment variable FASTMAML_EMU_ORDER sets it: ascending, descending, random or random:<seed>.
enum class Order { ascending, descending, random };
void set_order(Order order, uint64_t seed = 0);

// Device memory: 16-byte aligned, filled with NaN (all bits one), with inaccessible pages on both sides.
// A kernel that leaves it is stopped. Writes between the buffer and the next page are found after the launch.
void* allocate(size_t bytes);
void free(void* buffer);

// Counts of one kernel, by the symbol name that nvcc gives it.
struct Kernel {
  int64_t launches = 0, blocks = 0, threads = 0;
  int64_t bytes_read = 0, bytes_written = 0;  // of global memory, as requested; only in the race build
};
std::map<std::string, Kernel> kernels();
int64_t launches();
void reset_counts();
std::vector<std::string> compiled_kernels();      // every kernel of this program or library, launched or not; sorted
std::string readable(const std::string& kernel);  // the name without namespaces and parameters

// If the environment variable FASTMAML_EMU_LAUNCHED names a file, the program writes its launches there when it ends.
// Each kernel gets a line "launches threads shared_bytes symbol" with the largest block and dynamic shared memory.
// tests/kernel_launches.py reads the file.

// One launch: its size, and in the race build its bytes.
struct Launched {
  std::string kernel;
  int64_t blocks = 0;
  int threads = 0;  // in one block
  size_t shared_bytes = 0;
  int64_t bytes_read = 0, bytes_written = 0;
};
// Calls `see` for every launch from now on; an empty function ends this. With run = false kernels are announced but do not run.
void listen(std::function<void(const Launched&)> see, bool run = true);

// Is this the race build?
bool watched();

// Stops the race build's search for races. It then counts bytes only, and is several times as fast.
void only_count_bytes(bool only);

}  // namespace fastmaml::emu
