#include "ops/tree_sum.h"

#include <algorithm>
#include <utility>

namespace fastmaml {
namespace {

constexpr size_t kAlignment = 64;

size_t place_bytes(const OpTable& table, int64_t size, int64_t group) {
  return (size_t(group * size) * table.real_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

int64_t groups_of(int64_t tasks, int64_t group) { return (tasks + group - 1) / group; }

}  // namespace

int TreeSum::levels(int64_t groups) {
  int levels = 0;
  while ((int64_t(1) << levels) < groups) ++levels;
  return levels;
}

// Finished nodes wait for their siblings: at each level, one for every worker and one for the first group not yet started.
int64_t TreeSum::places(int64_t groups, int workers) { return std::min(groups, (workers + 1) * int64_t(levels(groups)) + workers); }

size_t TreeSum::room(const OpTable& table, int64_t tasks, int64_t size, int64_t group, int workers) {
  return size_t(places(groups_of(tasks, group), workers)) * place_bytes(table, size, group);
}

TreeSum::TreeSum(const OpTable& table, Arg arg, void* out, const void* w, int64_t tasks, int64_t size, int64_t group, int workers,
                 void* memory)
    : table_(table),
      arg_(arg),
      out_(out),
      w_(static_cast<const std::byte*>(w)),
      tasks_(tasks),
      size_(size),
      group_(group),
      groups_(groups_of(tasks, group)),
      levels_(levels(groups_)) {
  const int64_t count = places(groups_, workers);
  for (int64_t i = count; i-- > 0;) idle_.push_back(static_cast<std::byte*>(memory) + size_t(i) * place_bytes(table, size, group));
  waiting_.reserve(size_t(count));
}

void* TreeSum::take() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::byte* place = idle_.back();
  idle_.pop_back();
  ++taken_;
  return place;
}

std::vector<TreeSum::Node>::iterator TreeSum::find(int level, int64_t index) {
  return std::find_if(waiting_.begin(), waiting_.end(), [=](const Node& n) { return n.level == level && n.index == index; });
}

void TreeSum::add_group(int64_t group, std::byte* x) const {
  const int64_t first = group * group_, count = std::min(group_, tasks_ - first), bytes = size_ * int64_t(table_.real_bytes);
  if (w_)
    for (int64_t t = 0; t < count; ++t)
      table_.tree_reduce(x + t * bytes, x + t * bytes, w_ + (first + t) * int64_t(table_.real_bytes), 1, size_, size_, 0);
  for (int64_t apart = 1; apart < count; apart *= 2)
    for (int64_t t = 0; t + apart < count; t += 2 * apart) table_.tree_add(x + t * bytes, x + (t + apart) * bytes, size_);
}

// The last groups are left to finish(), where all threads can add them.
void TreeSum::give(int64_t group, void* x) {
  Node node{0, group, static_cast<std::byte*>(x)};
  add_group(group, node.sum);
  std::unique_lock<std::mutex> lock(mutex_);
  while (taken_ < groups_ && node.level < levels_) {
    if (has_sibling(node)) {
      const auto sibling = find(node.level, node.index ^ 1);
      if (sibling == waiting_.end()) break;
      std::byte *left = sibling->sum, *right = node.sum;
      if (node.index % 2 == 0) std::swap(left, right);
      waiting_.erase(sibling);
      lock.unlock();
      table_.tree_add(left, right, size_);
      lock.lock();
      idle_.push_back(right);
      node.sum = left;
    }
    ++node.level;
    node.index /= 2;
  }
  waiting_.push_back(node);
}

void TreeSum::finish(int workers, const ParallelFor& parallel_for) {
  struct Sum {
    std::byte* to;
    const std::byte* from;
  };
  std::vector<Sum> sums;
  for (int level = 0; level < levels_; ++level) {
    std::vector<Node> above;
    for (const Node& node : waiting_) {
      if (node.level != level) {
        above.push_back(node);
        continue;
      }
      if (node.index % 2 == 1) continue;  // its left sibling adds them
      if (has_sibling(node)) sums.push_back({node.sum, find(level, node.index + 1)->sum});
      above.push_back({level + 1, node.index / 2, node.sum});
    }
    waiting_ = std::move(above);
  }
  std::byte* const root = waiting_.front().sum;
  constexpr int64_t kShare = 16 * 1024;  // additions that are worth one thread
  constexpr int64_t kBlock = 1024;       // numbers of a block, so that all its sums stay in L1
  const int64_t bytes = int64_t(table_.real_bytes), shares = std::clamp<int64_t>(int64_t(sums.size() + 1) * size_ / kShare, 1, workers);
  const int64_t share = ((size_ + shares - 1) / shares + kBlock - 1) / kBlock * kBlock;
  const double mean = 1.0 / double(tasks_);
  const float mean_single = float(mean);
  const void* scale = nullptr;  // null means 1
  if (!w_) scale = table_.real_bytes == sizeof(float) ? static_cast<const void*>(&mean_single) : &mean;
  const auto columns = [&](int64_t i) {
    const int64_t end = std::min(size_, (i + 1) * share);
    for (int64_t from = i * share; from < end; from += kBlock) {
      const int64_t count = std::min(kBlock, end - from);
      for (const Sum& sum : sums) table_.tree_add(sum.to + from * bytes, sum.from + from * bytes, count);
      table_.tree_reduce(static_cast<std::byte*>(out_) + from * bytes, root + from * bytes, scale, 1, count, count, 0);
    }
  };
  shares > 1 ? parallel_for(shares, columns) : columns(0);
}

}  // namespace fastmaml
