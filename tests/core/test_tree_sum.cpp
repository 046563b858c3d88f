// A sum that is made while tasks are walked has the bits of the one that is made afterwards, in whatever order workers come, and holds no
// more places at once than it has room for.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa/choose_isa.h"
#include "ops/tree_sum.h"

namespace fastmaml {
namespace {

int passed = 0, failed = 0;

void report(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  std::printf("%s  %s\n", ok ? "ok  " : "FAIL", what.c_str());
}

void threads(int64_t n, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < n; ++i) pool.emplace_back([&body, i] { body(i); });
  body(0);
  for (std::thread& t : pool) t.join();
}

template <class T>
struct Problem {
  int64_t tasks, size;
  std::vector<T> x, w;

  Problem(int64_t tasks_, int64_t size_) : tasks(tasks_), size(size_), x(size_t(tasks_ * size_)), w(size_t(tasks_)) {
    std::mt19937 generator(unsigned(tasks_ * 1000 + size_));
    std::normal_distribution<double> normal;
    for (T& v : x) v = T(normal(generator));
    for (T& v : w) v = T(normal(generator));
  }

  std::vector<T> afterwards(const OpTable& table, bool weighted) const {
    std::vector<T> leaves = x, out(static_cast<size_t>(size));
    table.tree_reduce(out.data(), leaves.data(), weighted ? w.data() : nullptr, tasks, size, size, 0);
    return out;
  }
};

struct Room {
  std::vector<std::byte> bytes;
  std::byte* data;
  explicit Room(size_t size) : bytes(size + 64), data(bytes.data()) { data += (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64; }
};

// `workers` groups are under way at a time; which of them is done first, `generator` says.
template <class T>
std::vector<T> in_any_order(const OpTable& table, const Problem<T>& p, bool weighted, int64_t group, int workers, std::mt19937& generator) {
  std::vector<T> out(static_cast<size_t>(p.size));
  Room room(TreeSum::room(table, p.tasks, p.size, group, workers));
  TreeSum sum(table, Arg::grad, out.data(), weighted ? p.w.data() : nullptr, p.tasks, p.size, group, workers, room.data);
  const int64_t groups = (p.tasks + group - 1) / group;
  struct Begun {
    int64_t group;
    void* place;
  };
  std::vector<Begun> begun;
  int64_t next = 0;
  while (next < groups || !begun.empty()) {
    if (next < groups && int(begun.size()) < workers) {
      begun.push_back({next++, sum.take()});
      continue;
    }
    const size_t which = generator() % begun.size();
    const Begun done = begun[which];
    begun.erase(begun.begin() + int64_t(which));
    const int64_t first = done.group * group, count = std::min(group, p.tasks - first);
    std::memcpy(done.place, p.x.data() + first * p.size, size_t(count * p.size) * sizeof(T));
    sum.give(done.group, done.place);
  }
  sum.finish(workers, threads);
  return out;
}

// The first group takes longer than all others together.
template <class T>
std::vector<T> with_a_straggler(const OpTable& table, const Problem<T>& p, int workers) {
  std::vector<T> out(static_cast<size_t>(p.size));
  Room room(TreeSum::room(table, p.tasks, p.size, 1, workers));
  TreeSum sum(table, Arg::grad, out.data(), nullptr, p.tasks, p.size, 1, workers, room.data);
  void* const slow = sum.take();
  for (int64_t t = 1; t < p.tasks; ++t) {
    void* const place = sum.take();
    std::memcpy(place, p.x.data() + t * p.size, size_t(p.size) * sizeof(T));
    sum.give(t, place);
  }
  std::memcpy(slow, p.x.data(), size_t(p.size) * sizeof(T));
  sum.give(0, slow);
  sum.finish(workers, threads);
  return out;
}

template <class T>
std::vector<T> by_threads(const OpTable& table, const Problem<T>& p, bool weighted, int workers) {
  std::vector<T> out(static_cast<size_t>(p.size));
  Room room(TreeSum::room(table, p.tasks, p.size, 1, workers));
  TreeSum sum(table, Arg::grad, out.data(), weighted ? p.w.data() : nullptr, p.tasks, p.size, 1, workers, room.data);
  std::atomic<int64_t> next{0};
  threads(workers, [&](int64_t) {
    for (int64_t t = next++; t < p.tasks; t = next++) {
      void* const place = sum.take();
      std::memcpy(place, p.x.data() + t * p.size, size_t(p.size) * sizeof(T));
      sum.give(t, place);
    }
  });
  sum.finish(workers, threads);
  return out;
}

template <class T>
void same_bits(const OpTable& table, const std::string& name) {
  std::mt19937 generator(5);
  for (const int64_t tasks : {1, 2, 3, 5, 8, 13, 32, 37})
    for (const int64_t size : {1, 7, 2500, 20000}) {
      if (size > 2500 && tasks != 13) continue;
      const Problem<T> p(tasks, size);
      for (const bool weighted : {false, true}) {
        const std::vector<T> want = p.afterwards(table, weighted);
        bool same = true;
        for (const int64_t group : {1, 4, 16})
          for (const int workers : {1, 2, 5}) same = same && in_any_order(table, p, weighted, group, workers, generator) == want;
        same = same && by_threads(table, p, weighted, 3) == want;
        if (!weighted) same = same && with_a_straggler(table, p, 2) == want;
        report(same, name + ": " + std::to_string(tasks) + " tasks x " + std::to_string(size) + (weighted ? ", weighted" : ""));
      }
    }
}

// The places grow with the levels of the tree, not with the tasks.
void is_small() {
  const OpTable& table = cpu_ops(sizeof(float));
  const size_t of_one = TreeSum::room(table, 1, 1000, 1, 1), of_thousand = TreeSum::room(table, 1024, 1000, 1, 2);
  report(of_thousand == 32 * of_one, "room for 1,024 tasks and two workers is that of 32: three ways down ten levels, and two under way");
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  for (const std::string& isa : available_cpu_isas()) {
    set_cpu_isa(isa);
    same_bits<float>(cpu_ops(sizeof(float)), isa + " float");
    same_bits<double>(cpu_ops(sizeof(double)), isa + " double");
  }
  set_cpu_isa("");
  same_bits<double>(reference_ops(), "reference");
  is_small();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
