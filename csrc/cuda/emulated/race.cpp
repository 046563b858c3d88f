// The race build: with g++ -fsanitize=thread every load and store of a kernel calls a function of this file.
// Each word of memory remembers its last accesses. If two threads touch a word and one writes, a barrier must lie between.
// A race is therefore found in any order of threads, even if the values happen to be right.
// Atomics order only atomics. Shuffles, votes and __threadfence order nothing.
// If several threads write bytes of one word, only the last is remembered.
#include <algorithm>
#include <array>
#include <bit>
#include <memory>
#include <unordered_map>

#include "cuda/emulated/state.h"

namespace fastmaml::emu {
namespace {

// ---------------------------------------------------------------- who touched a word

class Touch {
 public:
  Touch() = default;
  Touch(Position position, int thread, unsigned bytes, bool atomic, uint32_t epoch, uint32_t clock)
      : epoch(epoch), clock(clock), what_(position.bits | uint64_t(thread) << 48 | uint64_t(bytes) << 58 | uint64_t(atomic) << 62) {}

  uint32_t epoch = 0;  // blocks that had begun and barriers that were passed, over all launches
  uint32_t clock = 0;  // of the lane

  int thread() const { return int(what_ >> 48 & 1023); }
  unsigned bytes() const { return unsigned(what_ >> 58 & 15); }  // of the word, a bit each
  bool atomic() const { return what_ >> 62 & 1; }
  Position position() const { return {what_ & ~(uint64_t(0x7fff) << 48)}; }  // addresses have 48 bits, and the highest one says which kind

 private:
  uint64_t what_ = 0;
};

struct alignas(64) Word {
  Touch write;
  Touch read[2];      // in the last block: of two warps where there were two, else the two last lanes
  Touch read_before;  // in a block before it
};

constexpr size_t kPage = 4096, kWords = kPage / 4;
struct Page {
  uint32_t launch = 0;
  bool foreign = false;  // the stack of another thread
  Range buffer;          // that the page belongs to
  std::array<Word, kWords> words;
  std::unique_ptr<std::array<Touch, kWords>> copying;  // cp.async that have not been waited for, where there have been any
};

// known[i][j]: the clock up to which lane i knows lane j's accesses. __syncwarp tells all lanes of its mask what any of them knows.
struct Clocks {
  std::array<std::array<uint32_t, 32>, 32> known;
  bool fresh = false;
};

class Race : public Watcher {
 public:
  Race() { watcher = this; }

  void begin_launch() override {
    ++launch_;
    launch_epoch_ = epoch_ + 1;
    sequence_.clear();
    if (pages_.size() > kMostPages) pages_.clear();
    recent_.fill({});
    image_ = image();
    static_neighbourhood_ = static_neighbourhood();
    dynamic_neighbourhood_ = dynamic_neighbourhood();
  }
  void begin_block() override {
    block_epoch_ = ++epoch_;
    sequence_.push_back({epoch_, blockIdx});
    dynamic_ = dynamic_range();
    for (size_t w = 0; w < block.warps.size(); ++w) reset(clocks_[w]);
  }
  void pass_barrier() override { ++epoch_; }
  void sync_warp(uint32_t mask) override {
    Clocks& clocks = clocks_[size_t(block.running->number / 32)];
    std::array<uint32_t, 32> all{};
    for (uint32_t rest = mask; rest; rest &= rest - 1)
      for (size_t j = 0; j < 32; ++j) all[j] = std::max(all[j], clocks.known[size_t(__builtin_ctz(rest))][j]);
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      const size_t lane = size_t(__builtin_ctz(rest));
      clocks.known[lane] = all;
      ++clocks.known[lane][lane];
    }
    clocks.fresh = false;
  }

  void access(Access access, const void* address, size_t bytes, Position position) override {
    const Thread& self = *block.running;
    const auto* at = static_cast<const unsigned char*>(address);
    if (stacks[size_t(self.number)].holds(address) || image_.holds(address)) return;
    const Range* shared = shared_near(address);
    if (shared && !shared->holds(address, bytes)) fail_beside(*shared, access, position);
    if (!shared) {
      if (access != Access::write) block.bytes_read += int64_t(bytes);
      if (access != Access::read) block.bytes_written += int64_t(bytes);
    }
    if (counts_bytes_alone) return;
    const uint32_t clock = clocks_[size_t(self.number / 32)].known[size_t(self.lane)][size_t(self.lane)];
    oldest_epoch_ = shared ? block_epoch_ : launch_epoch_;
    for (size_t done = 0; done < bytes;) {
      const size_t in_word = reinterpret_cast<uintptr_t>(at + done) % 4, n = std::min(4 - in_word, bytes - done);
      const unsigned of_word = ((1u << n) - 1) << in_word;
      touch(access, at + done, n, {position, self.number, of_word, access == Access::atomic, epoch_, clock});
      done += n;
    }
  }

 private:
  static constexpr size_t kMostPages = 4096;                 // 300 MB
  uint32_t epoch_ = 0, launch_epoch_ = 1, block_epoch_ = 1;  // now, and when the launch and the block began
  uint32_t oldest_epoch_ = 1;  // of a touch that matters: of this block where memory is shared, else of this launch
  uint32_t launch_ = 0;
  Range image_, static_neighbourhood_, dynamic_neighbourhood_, dynamic_;
  struct Begun {
    uint32_t epoch;
    uint3 block;
  };
  std::vector<Begun> sequence_;                           // the blocks of this launch
  std::vector<Clocks> clocks_ = std::vector<Clocks>(32);  // of the warps of a block
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  };
  std::array<Recent, 64> recent_;

  static void reset(Clocks& clocks) {
    if (clocks.fresh) return;
    for (size_t i = 0; i < 32; ++i) {
      clocks.known[i].fill(0);
      clocks.known[i][i] = 1;
    }
    clocks.fresh = true;
  }

  // The __shared__ variable, or dynamic shared memory, around an address. Null outside shared memory.
  // For an address in shared memory that the kernel may not touch, a range without that address.
  const Range* shared_near(const void* address) const {
    if (dynamic_neighbourhood_.holds(address)) return &dynamic_;
    if (!static_neighbourhood_.holds(address)) return nullptr;
    static const Range none{nullptr, 0, "the shared memory of the kernel"};
    for (const Range& variable : *block.static_shared)
      if (variable.holds(address)) return &variable;
    return &none;
  }

  Page& page(const void* address) {
    const uintptr_t number = reinterpret_cast<uintptr_t>(address) / kPage;
    Recent& recent = recent_[number % recent_.size()];
    if (recent.page && recent.number == number) return *recent.page;
    std::unique_ptr<Page>& page = pages_[number];
    if (!page) page = std::make_unique<Page>();
    if (page->launch != launch_) {
      page->launch = launch_;
      const auto* low = reinterpret_cast<const unsigned char*>(number * kPage);
      page->buffer = buffer_near(address, {low, kPage, ""});
      page->foreign = stacks.hold(address);
    }
    recent = {number, page.get()};
    return *page;
  }

  // Is the earlier access of this launch, and not ordered before the running thread's access?
  bool open(const Touch& before, const Touch& now) const {
    if (before.epoch < oldest_epoch_ || !(before.bytes() & now.bytes())) return false;
    if (before.epoch < block_epoch_) return true;
    const int of_before = before.thread(), of_now = now.thread();
    if (of_before == of_now || before.epoch < now.epoch) return false;
    if (of_before / 32 != of_now / 32) return true;
    return before.clock > clocks_[size_t(of_now / 32)].known[size_t(of_now % 32)][size_t(of_before % 32)];
  }

  void touch(Access access, const unsigned char* address, size_t bytes, const Touch& now) {
    Page& page = this->page(address);
    if (page.foreign) fail("it " + verb(access) + " a local variable of another thread at " + now.position().text());
    if (!page.buffer.holds(address, bytes)) fail_beside(page.buffer, access, now.position());
    const size_t number = reinterpret_cast<uintptr_t>(address) % kPage / 4;
    Word& word = page.words[number];
    if (page.copying && access != Access::land) {
      const Touch& copying = (*page.copying)[number];
      if (copying.epoch >= block_epoch_ && (copying.bytes() & now.bytes()))
        fail("missing wait: it " + verb(access) + " " + name_of(address) + " at " + now.position().text() + ", where the cp.async at " +
             copying.position().text() + " of thread " + to_string(index_of(copying)) + " may still be under way");
    }
    if (open(word.write, now) && !(now.atomic() && word.write.atomic())) report(access, address, now, word.write, "writes");
    if (access == Access::read) return remember(word, now);
    for (const Touch* read : {&word.read[0], &word.read[1], &word.read_before})
      if (open(*read, now)) report(access, address, now, *read, "reads");
    word.write = now;
    if (access == Access::copy) {
      if (!page.copying) page.copying = std::make_unique<std::array<Touch, kWords>>();
      (*page.copying)[number] = now;
    }
    if (access == Access::land) (*page.copying)[number] = {};
  }

  void remember(Word& word, const Touch& now) const {
    Touch &a = word.read[0], &b = word.read[1];
    if (a.epoch != now.epoch) {  // a barrier or a block ago
      if (a.epoch >= oldest_epoch_ && a.epoch < block_epoch_) word.read_before = a;
      a = now;
      b = {};
      return;
    }
    const int of_a = a.thread(), of_now = now.thread();
    if (b.epoch != now.epoch) {
      (of_a == of_now ? a : b) = now;
      return;
    }
    const int of_b = b.thread();
    const bool same_warp_a = of_a / 32 == of_now / 32, same_warp_b = of_b / 32 == of_now / 32;
    if (of_b == of_now) {
      b = now;
    } else if (of_a == of_now || (same_warp_a && same_warp_b)) {
      a = b;
      b = now;
    } else if (!same_warp_a) {
      b = now;
    }
  }

  // ---------------------------------------------------------------- sentences

  static std::string verb(Access access) { return access == Access::read ? "reads" : access == Access::atomic ? "updates" : "writes"; }
  static uint3 index_of(const Touch& touch) {
    const unsigned n = unsigned(touch.thread());
    return {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
  }
  [[noreturn]] static void fail_beside(const Range& range, Access access, Position position) {
    const std::string size = range.bytes ? " of " + std::to_string(range.bytes) + " bytes" : "";
    fail("out of bounds: it " + verb(access) + " beside " + range.name + size + " at " + position.text());
  }
  std::string name_of(const void* address) const {
    const Range* shared = shared_near(address);
    return shared ? shared->name : "global memory";
  }

  [[noreturn]] void report(Access access, const void* address, const Touch& now, const Touch& before, const char* did) const {
    const bool same_block = before.epoch >= block_epoch_;
    const auto later = [&](uint32_t epoch, const Begun& begun) { return epoch < begun.epoch; };
    const auto begun = std::upper_bound(sequence_.begin(), sequence_.end(), before.epoch, later) - 1;
    const std::string of_block = same_block ? "" : " of block " + to_string(begun->block);
    const char* missing = !same_block                                 ? "no launch"
                          : before.thread() / 32 == now.thread() / 32 ? "no __syncwarp or __syncthreads"
                                                                      : "no __syncthreads";
    fail("race: it " + verb(access) + " " + name_of(address) + " at " + now.position().text() + ", which thread " +
         to_string(index_of(before)) + of_block + " " + did + " at " + before.position().text() + ", with " + missing + " between them");
  }
};

Race race;

void hook(Access access, const void* address, size_t bytes, const void* code) {
  if (block.running) race.access(access, address, bytes, Position::of_code(code));
}

}  // namespace
}  // namespace fastmaml::emu

// ---------------------------------------------------------------- what -fsanitize=thread calls

using fastmaml::emu::Access;

#define HOOK(name, access, bytes) \
  extern "C" void __tsan_##name(void* address) { fastmaml::emu::hook(Access::access, address, bytes, __builtin_return_address(0)); }
#define HOOKS(bytes)                         \
  HOOK(read##bytes, read, bytes)             \
  HOOK(write##bytes, write, bytes)           \
  HOOK(unaligned_read##bytes, read, bytes)   \
  HOOK(unaligned_write##bytes, write, bytes) \
  HOOK(volatile_read##bytes, read, bytes)    \
  HOOK(volatile_write##bytes, write, bytes)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" {
void __tsan_read_range(void* address, size_t bytes) { fastmaml::emu::hook(Access::read, address, bytes, __builtin_return_address(0)); }
void __tsan_write_range(void* address, size_t bytes) { fastmaml::emu::hook(Access::write, address, bytes, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// For host code in the same files: guards of static variables.
unsigned char __tsan_atomic8_load(const volatile unsigned char* from, int) { return __atomic_load_n(from, __ATOMIC_SEQ_CST); }
void __tsan_atomic8_store(volatile unsigned char* to, unsigned char value, int) { __atomic_store_n(to, value, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_load(const volatile int* from, int) { return __atomic_load_n(from, __ATOMIC_SEQ_CST); }
void __tsan_atomic32_store(volatile int* to, int value, int) { __atomic_store_n(to, value, __ATOMIC_SEQ_CST); }
int __tsan_atomic32_fetch_add(volatile int* to, int value, int) { return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST); }
}
