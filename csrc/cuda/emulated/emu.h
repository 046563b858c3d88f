// What tests and bindings ask of the emulator, beside launching: the order of threads, guarded buffers, what was launched. Kernels see
// cuda_emu.h.
//
// A launch that goes wrong throws std::runtime_error with the kernel, the block, the thread and one sentence. Every build finds
// deadlocks, divergent barriers, masks that name lanes that returned, accesses outside of allocate()'s buffers and of dynamic shared
// memory, indices outside of arrays, misaligned vectors and cp.async without a wait (the values are NaN until then); the race build
// also races, and touches of cp.async's target before its wait. No build sees the GPU's rounding of fast intrinsics, its weak order of
// memory, coalescing or registers. A pointer that leaves one __shared__ array for its neighbour goes unnoticed, a loop that never
// ends is not interrupted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace fastmaml::emu {

// The order in which blocks, and between two barriers the threads of a block, take their turns. FASTMAML_EMU_ORDER=ascending,
// descending, random or random:<seed> sets it from outside.
enum class Order { ascending, descending, random };
void set_order(Order order, uint64_t seed = 0);

// Device memory: 16-byte aligned, filled with NaN (all bits one), with inaccessible pages on both sides. A kernel that
// leaves it is stopped, or found out after the launch where it wrote to the bytes between the buffer and the next page.
void* allocate(size_t bytes);
void free(void* buffer);

// What ran, by the symbol name that nvcc gives the kernel.
struct Kernel {
  int64_t launches = 0, blocks = 0, threads = 0;
  int64_t bytes_read = 0, bytes_written = 0;  // of global memory, as requested; by the race build alone
};
std::map<std::string, Kernel> kernels();
int64_t launches();
void reset_counts();
std::vector<std::string> compiled_kernels();      // every kernel of this program or library, launched or not; sorted
std::string readable(const std::string& kernel);  // without namespaces and parameters

// Where the environment variable FASTMAML_EMU_LAUNCHED names a file, the program leaves there what it launched: for each of its kernels
// a line "launches threads shared_bytes symbol", with the largest block and dynamic shared memory. tests/kernel_launches.py reads it.

// One launch: its size, and the bytes by the race build alone.
struct Launched {
  std::string kernel;
  int64_t blocks = 0;
  int threads = 0;  // of a block
  size_t shared_bytes = 0;
  int64_t bytes_read = 0, bytes_written = 0;
};
// `see` hears of every launch from now on, until it is empty. With run = false kernels are announced and not run.
void listen(std::function<void(const Launched&)> see, bool run = true);

// Whether this is the race build.
bool watched();

// The race build stops looking for races and counts bytes alone, which is several times as fast.
void only_count_bytes(bool only);

}  // namespace fastmaml::emu
