#include "plan/stash_budget.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <thread>

namespace fastmaml {
namespace {

constexpr size_t kShare = 4;                        // all threads' arenas together take at most 1 / kShare of the machine's memory
constexpr size_t kDeviceBytes = size_t(256) << 20;  // for one task: on a device all tasks' arenas are in memory at once
constexpr size_t kAtOnceBytes = size_t(16) << 20;

size_t limit_in(const char* path) {
  std::ifstream file(path);
  size_t bytes = 0;
  return file >> bytes ? bytes : SIZE_MAX;  // "max" means no limit
}

}  // namespace

size_t machine_memory() {
  static const size_t bytes = [] {
    const size_t physical = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
    return std::min({physical, limit_in("/sys/fs/cgroup/memory.max"), limit_in("/sys/fs/cgroup/memory/memory.limit_in_bytes")});
  }();
  return bytes;
}

size_t stash_budget(const OpTable& table, bool at_once) {
  if (at_once) return kAtOnceBytes;
  return table.device ? kDeviceBytes : machine_memory() / kShare / std::max(std::thread::hardware_concurrency(), 1u);
}

}  // namespace fastmaml
