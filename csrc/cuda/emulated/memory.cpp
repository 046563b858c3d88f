// Memory of the emulated device: guarded buffers, poisoned shared memory, copies that happen at their wait, and threads' faults.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <new>

#include "cuda/emulated/state.h"

namespace fastmaml::emu {
namespace {

constexpr unsigned char kPoison = 0xff;
constexpr size_t kPage = 4096;
constexpr size_t kGuard = 256 * kPage;  // on each side, so that far accesses also end there

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Is all of [at, end) poison? Each byte is compared with the next one, many at a time.
bool poisoned(const unsigned char* at, const unsigned char* end) {
  return at == end || (*at == kPoison && std::memcmp(at, at + 1, size_t(end - at - 1)) == 0);
}

// A buffer between guards. Its end, rounded up to 16 bytes, is the end of a page. The rest of its pages stays poisoned.
struct Guarded {
  unsigned char* mapping;
  size_t pages;  // bytes of whole pages
  unsigned char* data;
  size_t bytes;

  static Guarded make(size_t bytes) {
    const size_t pages = std::max(round_up(bytes, kPage), kPage);
    void* mapped = mmap(nullptr, pages + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    unsigned char* low = static_cast<unsigned char*>(mapped) + kGuard;
    if (mprotect(low, pages, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    Guarded it{low - kGuard, pages, nullptr, 0};
    std::memset(low, kPoison, pages);
    it.resize(bytes);
    return it;
  }
  void resize(size_t n) {
    bytes = n;
    data = mapping + kGuard + pages - round_up(n, 16);
  }
  bool near(const void* address) const { return mapping <= address && address < mapping + pages + 2 * kGuard; }
  // The watched bytes around the data start at low() and end at high().
  unsigned char* low() const { return std::max(mapping + kGuard, data - kPage); }
  unsigned char* high() const { return mapping + kGuard + pages; }
  bool clean() const { return poisoned(low(), data) && poisoned(data + bytes, high()); }
  void mend() const {
    std::fill(low(), data, kPoison);
    std::fill(data + bytes, high(), kPoison);
  }
};

std::mutex buffers_lock;
std::map<void*, Guarded>& buffers() {
  static std::map<void*, Guarded> it;
  return it;
}

Guarded& shared() {
  static Guarded it = Guarded::make(228 * 1024);
  return it;
}

std::string beside(const Guarded& g, const unsigned char* address, const std::string& what) {
  const bool before = address < g.data;
  const int64_t far = before ? g.data - address : address - (g.data + g.bytes);
  return std::to_string(far) + " bytes " + (before ? "before" : "past the end of") + " " + what + " of " + std::to_string(g.bytes) +
         " bytes";
}

}  // namespace

// ---------------------------------------------------------------- buffers

void* allocate(size_t bytes) {
  const Guarded buffer = Guarded::make(bytes);
  const std::lock_guard<std::mutex> lock(buffers_lock);
  buffers()[buffer.data] = buffer;
  return buffer.data;
}

void free(void* buffer) {
  const std::lock_guard<std::mutex> lock(buffers_lock);
  const auto found = buffers().find(buffer);
  if (found == buffers().end()) return;
  munmap(found->second.mapping, found->second.pages + 2 * kGuard);
  buffers().erase(found);
}

Range buffer_near(const void* address, const Range& whole_page) {
  const std::lock_guard<std::mutex> lock(buffers_lock);
  for (const auto& [data, buffer] : buffers())
    if (buffer.near(address)) return {buffer.data, buffer.bytes, "a buffer"};
  return whole_page;
}

void check_guards() {
  if (!shared().clean()) fail("a thread has written beside the " + std::to_string(shared().bytes) + " bytes of dynamic shared memory");
  const std::lock_guard<std::mutex> lock(buffers_lock);
  for (const auto& [data, buffer] : buffers())
    if (!buffer.clean()) fail("a thread has written beside a buffer of " + std::to_string(buffer.bytes) + " bytes");
}

void mend_guards() {
  shared().mend();
  const std::lock_guard<std::mutex> lock(buffers_lock);
  for (const auto& [data, buffer] : buffers()) buffer.mend();
}

// ---------------------------------------------------------------- shared memory

unsigned char* dynamic_shared() { return shared().data; }

void poison_shared(size_t dynamic_bytes) {
  Guarded& dynamic = shared();
  std::memset(dynamic.data, kPoison, round_up(dynamic.bytes, 16));  // clears the previous block's values
  dynamic.resize(dynamic_bytes);
  for (const Range& variable : *block.static_shared) std::memset(const_cast<unsigned char*>(variable.low), kPoison, variable.bytes);
}

Range dynamic_range() { return {shared().data, shared().bytes, "dynamic shared memory"}; }
Range dynamic_neighbourhood() { return {shared().mapping, shared().pages + 2 * kGuard, ""}; }

// ---------------------------------------------------------------- copies to shared memory

void async_copy(void* to, const void* from, int bytes, bool valid, Where where) {
  const auto misaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % size_t(bytes) != 0; };
  if (misaligned(to) || (valid && misaligned(from)))
    fail("cp.async at " + to_string(where) + " of " + std::to_string(bytes) + " bytes that are not aligned to it");
  if (valid)
    static_cast<void>(*static_cast<const volatile char*>(from));  // read here, so that a fault is reported at the copy and not at the wait
  Thread& self = *block.running;
  self.copies.push_back({to, from, bytes, valid, self.group, where});
  if (!watcher) return;
  if (valid) watcher->access(Access::read, from, size_t(bytes), Position::of(where));
  watcher->access(Access::copy, to, size_t(bytes), Position::of(where));
}

void async_commit() { ++block.running->group; }

void async_wait(int left) {
  Thread& self = *block.running;
  const auto done = [&](const AsyncCopy& c) { return c.group < self.group - left; };
  for (const AsyncCopy& c : self.copies) {
    if (!done(c)) continue;
    if (c.valid)
      std::memcpy(c.to, c.from, size_t(c.bytes));
    else
      std::memset(c.to, 0, size_t(c.bytes));
    if (watcher) watcher->access(Access::land, c.to, size_t(c.bytes), Position::of(c.where));
  }
  std::erase_if(self.copies, done);
}

void finish_copies() {
  const Thread& self = *block.running;
  if (!self.copies.empty()) fail("it returns, but never waited for its cp.async at " + to_string(self.copies.front().where));
}

void atomic_access(const void* address, size_t bytes, Where where) {
  if (watcher) watcher->access(Access::atomic, address, bytes, Position::of(where));
}

// ---------------------------------------------------------------- faults

namespace {

struct sigaction old_actions[2];
stack_t old_stack;
const unsigned char* fault_address;
const void* fault_code;
bool fault_has_address;
thread_local bool handled_here = false;  // this host thread runs the launch

void on_fault(int signal, siginfo_t* info, void* context) {
  if (!block.running || !handled_here) {  // not a kernel's fault: use the previous handler
    sigaction(signal, &old_actions[signal == SIGBUS], nullptr);
    return;
  }
  fault_address = static_cast<unsigned char*>(info->si_addr);
  fault_has_address = info->si_code != SI_KERNEL;  // x86 gives this code for a misaligned vector
#ifdef __x86_64__
  fault_code = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#endif
  block.faulted = true;
  Fiber abandoned;
  switch_fiber(abandoned, block.scheduler);
}

}  // namespace

FaultHandler::FaultHandler() {
  static unsigned char stack[64 * 1024];
  stack_t own{};
  own.ss_sp = stack;
  own.ss_size = sizeof stack;
  sigaltstack(&own, &old_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_actions[0]);
  sigaction(SIGBUS, &action, &old_actions[1]);
  handled_here = true;
}

FaultHandler::~FaultHandler() {
  handled_here = false;
  sigaction(SIGSEGV, &old_actions[0], nullptr);
  sigaction(SIGBUS, &old_actions[1], nullptr);
  sigaltstack(&old_stack, nullptr);
}

std::string describe_fault() {
  const std::string at = " at " + code_position(fault_code);
  if (!fault_has_address) return "misaligned access or wild pointer" + at;
  if (shared().near(fault_address)) return "out of bounds" + at + ", " + beside(shared(), fault_address, "the dynamic shared memory");
  const std::byte* address = reinterpret_cast<const std::byte*>(fault_address);
  for (size_t i = 0; i < stacks.size(); ++i)
    if (address < stacks[i].low && stacks[i].low - Stacks::kGuard <= address)
      return "its local variables need more than " + std::to_string(Stacks::kBytes) + " bytes" + at;
  const std::lock_guard<std::mutex> lock(buffers_lock);
  for (const auto& [data, buffer] : buffers())
    if (buffer.near(fault_address)) return "out of bounds" + at + ", " + beside(buffer, fault_address, "a buffer");
  char text[32];
  std::snprintf(text, sizeof text, "%p", static_cast<const void*>(fault_address));
  return "out of bounds" + at + ", address " + text + " belongs to no buffer";
}

}  // namespace fastmaml::emu
