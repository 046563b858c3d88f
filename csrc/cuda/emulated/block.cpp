// Runs a launch: one block after the other. In a block, every warp runs until all its lanes wait or have returned.
// Reports what cannot go on.
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "cuda/emulated/state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fastmaml::emu {

Block block;
Stacks stacks;
Watcher* watcher = nullptr;
bool counts_bytes_alone = false;
int64_t blocks_at_once = 16;

bool watched() { return watcher != nullptr; }

namespace {

std::mutex one_launch;
std::map<std::string, Kernel> counts;
std::function<void(const Launched&)> listener;
bool listener_only = false;

struct LaunchFile {
  const char* const path = std::getenv("FASTMAML_EMU_LAUNCHED");
  struct Kernel {
    int64_t launches = 0;
    int threads = 0;  // in the largest block
    size_t shared_bytes = 0;
  };
  std::map<std::string, Kernel> kernels;  // all since the program began; reset_counts() keeps them

  ~LaunchFile() {
    if (!path || !*path) return;
    std::ofstream file(path);
    for (const std::string& name : compiled_kernels()) {
      const Kernel& kernel = kernels[name];
      file << kernel.launches << " " << kernel.threads << " " << kernel.shared_bytes << " " << name << "\n";
    }
  }
} launch_file;

// ---------------------------------------------------------------- order

struct Turns {
  Order order = Order::ascending;
  uint64_t state = 0;

  Turns() {
    const char* text = std::getenv("FASTMAML_EMU_ORDER");
    const std::string whole = text ? text : "ascending", name = whole.substr(0, whole.find(':'));
    order = name == "descending" ? Order::descending : name == "random" ? Order::random : Order::ascending;
    if (name != whole) state = std::strtoull(whole.c_str() + name.size() + 1, nullptr, 10);
    if (name != "ascending" && name != "descending" && name != "random")
      throw std::runtime_error("FASTMAML_EMU_ORDER is ascending, descending, random or random:<seed>, not " + whole);
  }
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int lane(uint32_t ready) {
    if (order == Order::ascending) return __builtin_ctz(ready);
    if (order == Order::descending) return 31 - __builtin_clz(ready);
    const int by = int(next() % 32);
    return (__builtin_ctz((ready >> by) | (ready << (32 - by) % 32)) + by) % 32;
  }
  void all(std::vector<int64_t>& numbers) {
    std::iota(numbers.begin(), numbers.end(), 0);
    if (order == Order::descending) std::reverse(numbers.begin(), numbers.end());
    if (order == Order::random)
      for (size_t i = numbers.size(); i > 1; --i) std::swap(numbers[i - 1], numbers[next() % i]);
  }
};
Turns& turns() {
  static Turns it;
  return it;
}

// ---------------------------------------------------------------- threads

const Operation kBarrier{"__syncthreads", nullptr};

std::string headline() {
  const std::string thread = block.running ? ", thread " + to_string(block.running->index) : "";
  return readable(kernel_symbol(block.launch->kernel)) + ", block " + to_string(blockIdx) + thread + ": ";
}

std::string at(const Thread& thread) {
  return "thread " + to_string(thread.index) + " waits in " + thread.waits->name + " at " + to_string(thread.where);
}

void give_way() {
  Thread& self = *block.running;
  switch_fiber(self.fiber, block.scheduler);
}

void thread_main() {
  block.launch->body(block.launch->call);
  finish_copies();
  Thread& self = *block.running;
  const uint32_t bit = 1u << self.lane;
  self.warp->ready &= ~bit;
  self.warp->returned |= bit;
  --block.alive;
  for (uint32_t others = self.warp->lanes & ~self.warp->returned; others; others &= others - 1) {
    const Thread& other = (&self - self.lane)[__builtin_ctz(others)];
    if (other.waits && other.waits->run && (other.mask & bit)) fail("it returns, but " + at(other) + " with a mask that names it");
  }
  give_way();
}

void resume(Thread& thread) {
  block.running = &thread;
  threadIdx = thread.index;
  switch_fiber(block.scheduler, thread.fiber);
  if (block.faulted) block.failure = headline() + describe_fault();
  block.running = nullptr;
  if (!block.failure.empty()) throw std::runtime_error(block.failure);
}

// ---------------------------------------------------------------- blocks

void begin_block(size_t warps) {
  const dim3 size = block.launch->block;
  block.alive = block.threads.size();
  block.at_barrier = block.votes = 0;
  block.warps.assign(warps, Warp{});
  for (size_t i = 0; i < block.threads.size(); ++i) {
    Thread& t = block.threads[i];
    t.index = {unsigned(i) % size.x, unsigned(i) / size.x % size.y, unsigned(i) / size.x / size.y};
    t.number = int(i);
    t.lane = int(i % 32);
    t.warp = &block.warps[i / 32];
    t.warp->ready = t.warp->lanes |= 1u << t.lane;
    t.waits = nullptr;
    t.copies.clear();
    t.group = 0;
    stacks.prepare(t.fiber, i, thread_main);
  }
  if (watcher) watcher->begin_block();
}

void open_barrier() {
  const Thread& first = block.threads.front();
  for (const Thread& t : block.threads) {
    const char *file = t.where.file_name(), *of_first = first.where.file_name();
    if (t.where.line() != first.where.line() || (file != of_first && std::strcmp(file, of_first)))
      fail("divergent barrier: " + at(first) + ", but " + at(t));
  }
  for (Thread& t : block.threads) t.waits = nullptr;
  block.result = block.votes;
  block.at_barrier = block.votes = 0;
  for (Warp& warp : block.warps) warp.ready = warp.lanes;
  if (watcher) watcher->pass_barrier();
}

// All threads wait or have returned, but not all wait at the barrier.
[[noreturn]] void fail_stuck() {
  const Thread *barrier = nullptr, *warp = nullptr, *returned = nullptr;
  for (const Thread& t : block.threads) {
    const Thread*& kind = !t.waits ? returned : t.waits->run ? warp : barrier;
    if (!kind) kind = &t;
  }
  if (barrier && returned && !warp)
    fail("divergent barrier: " + at(*barrier) + ", but thread " + to_string(returned->index) + " has returned");
  if (barrier && warp) fail("deadlock: " + at(*barrier) + ", but " + at(*warp));
  for (const Thread& t : block.threads)
    if (t.waits && (t.waits != warp->waits || t.mask != warp->mask))
      fail("deadlock: " + at(*warp) + ", but " + at(t) + ", with another mask or operation");
  fail("deadlock: " + at(*warp) + " for lanes that never come");
}

void run_block(std::vector<int64_t>& order) {
  begin_block(order.size());
  while (block.alive) {
    turns().all(order);
    for (const int64_t w : order) {
      Warp& warp = block.warps[size_t(w)];
      while (warp.ready) resume(block.threads[size_t(w * 32 + turns().lane(warp.ready))]);
    }
    if (!block.alive) break;
    if (block.at_barrier < block.threads.size()) fail_stuck();
    open_barrier();
  }
}

void check_launch(const Launch& launch) {
  const dim3 g = launch.grid, b = launch.block;
  constexpr size_t kMostShared = 227 * 1024;  // for one block on sm_90
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) fail("no such grid: " + to_string(uint3{g.x, g.y, g.z}));
  if (!b.x || !b.y || !b.z || b.z > 64 || size_t(b.x) * b.y * b.z > 1024) fail("no such block: " + to_string(uint3{b.x, b.y, b.z}));
  if (launch.shared_bytes > kMostShared) fail(std::to_string(launch.shared_bytes) + " bytes of shared memory are too many");
}

}  // namespace

// ---------------------------------------------------------------- for the other files

std::string to_string(uint3 i) { return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")"; }

std::string to_string(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string Position::text() const {
  if (bits & kWhere) return to_string(std::bit_cast<Where>(bits & ~kWhere));
  return code_position(reinterpret_cast<const void*>(bits - 1));  // the address of the call, not of its return
}

void fail(const std::string& sentence) {
  if (!block.running) throw std::runtime_error(headline() + sentence);
  block.failure = headline() + sentence;
  give_way();
  __builtin_unreachable();
}

void wait_warp(const Operation& operation, uint32_t mask, void* deposit, Where where) {
  Thread& self = *block.running;
  Thread* lanes = &self - self.lane;
  const uint32_t bit = 1u << self.lane;
  const auto call = [&] { return std::string(operation.name) + " at " + to_string(where); };
  if (!(mask & bit)) fail(call() + " with a mask that does not name its own lane " + std::to_string(self.lane));
  if (const uint32_t gone = mask & (self.warp->returned | ~self.warp->lanes))
    fail(call() + " with a mask that names lane " + std::to_string(__builtin_ctz(gone)) + ", which has returned or does not exist");
  self.waits = &operation;
  self.mask = mask;
  self.deposit = deposit;
  self.where = where;
  self.warp->ready &= ~bit;
  if (self.warp->ready & mask) return give_way();  // not the last one to arrive
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const Thread& other = lanes[__builtin_ctz(rest)];
    if (other.waits != &operation || other.mask != mask) return give_way();
  }
  operation.run(lanes, mask);
  for (uint32_t rest = mask; rest; rest &= rest - 1) lanes[__builtin_ctz(rest)].waits = nullptr;
  self.warp->ready |= mask;
}

int barrier(Vote vote, bool value, Where where) {
  Thread& self = *block.running;
  self.waits = &kBarrier;
  self.where = where;
  self.warp->ready &= ~(1u << self.lane);
  ++block.at_barrier;
  block.votes += value;
  give_way();
  if (vote == Vote::count) return int(block.result);
  return vote == Vote::any ? block.result > 0 : block.result == block.threads.size();
}

// ---------------------------------------------------------------- for launchers and tests

void launch(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const std::string symbol = kernel_symbol(launch.kernel);
  Launched launched{symbol, int64_t(launch.grid.x) * launch.grid.y * launch.grid.z, int(launch.block.x * launch.block.y * launch.block.z),
                    launch.shared_bytes};
  if (listener_only) return listener(launched);
  block.launch = &launch;
  block.running = nullptr;
  block.failure.clear();
  block.faulted = false;
  block.bytes_read = block.bytes_written = 0;
  blockIdx = {0, 0, 0};
  check_launch(launch);
  blockDim = launch.block;
  gridDim = launch.grid;
  const size_t threads = size_t(blockDim.x) * blockDim.y * blockDim.z;
  stacks.reserve(threads);
  block.threads.resize(threads);

  block.static_shared = &static_shared(launch.kernel);
  if (watcher) watcher->begin_launch();

  const FaultHandler handler;
  std::vector<int64_t> blocks(size_t(gridDim.x) * gridDim.y * gridDim.z), warps((threads + 31) / 32);
  turns().all(blocks);
  try {
    for (const int64_t b : blocks) {
      blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y), unsigned(b / gridDim.x / gridDim.y)};
      poison_shared(launch.shared_bytes);
      run_block(warps);
      check_guards();
    }
  } catch (...) {
    mend_guards();
    throw;
  }
  Kernel& kernel = counts[symbol];
  ++kernel.launches;
  kernel.blocks += int64_t(blocks.size());
  kernel.threads += int64_t(blocks.size() * threads);
  kernel.bytes_read += block.bytes_read;
  kernel.bytes_written += block.bytes_written;
  LaunchFile::Kernel& in_file = launch_file.kernels[symbol];
  ++in_file.launches;
  in_file.threads = std::max(in_file.threads, launched.threads);
  in_file.shared_bytes = std::max(in_file.shared_bytes, launched.shared_bytes);
  launched.bytes_read = block.bytes_read;
  launched.bytes_written = block.bytes_written;
  if (listener) listener(launched);
}

void listen(std::function<void(const Launched&)> see, bool run) {
  const std::lock_guard<std::mutex> lock(one_launch);
  listener = std::move(see);
  listener_only = listener && !run;
}

void only_count_bytes(bool only) { counts_bytes_alone = only; }

void set_order(Order order, uint64_t seed) {
  const std::lock_guard<std::mutex> lock(one_launch);
  turns().order = order;
  turns().state = seed;
}

std::map<std::string, Kernel> kernels() {
  const std::lock_guard<std::mutex> lock(one_launch);
  return counts;
}

int64_t launches() {
  int64_t sum = 0;
  for (const auto& [name, kernel] : kernels()) sum += kernel.launches;
  return sum;
}

void reset_counts() {
  const std::lock_guard<std::mutex> lock(one_launch);
  counts.clear();
}

}  // namespace fastmaml::emu
