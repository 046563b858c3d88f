// The sum of one result over tasks, in the order of OpTable::tree_reduce. It is added up while the tasks are walked.
// A task's numbers are then still in cache, and memory holds only a few tasks' numbers at once.
#pragma once

#include <mutex>
#include <vector>

#include "ops/ops.h"

namespace fastmaml {

class TreeSum {
 public:
  // out = sum_t w[t] x[t] (w null: the mean) of x [tasks, size]. `workers` workers deliver groups of `group` tasks, a power of two.
  // memory: room(..) bytes, 64-byte aligned.
  TreeSum(const OpTable& table, Arg arg, void* out, const void* w, int64_t tasks, int64_t size, int64_t group, int workers, void* memory);
  static size_t room(const OpTable& table, int64_t tasks, int64_t size, int64_t group, int workers);

  Arg arg() const { return arg_; }
  int64_t size() const { return size_; }

  // Every worker, for every group: take() says where to put the group's x, give() says that x is complete.
  void* take();
  void give(int64_t group, void* x);
  // Call when every group was given. Adds up the remaining nodes.
  void finish(int workers, const ParallelFor& parallel_for);

 private:
  struct Node {
    int level;      // the node covers 2^level groups
    int64_t index;  // the first is index 2^level
    std::byte* sum;
  };
  static int levels(int64_t groups);
  static int64_t places(int64_t groups, int workers);
  bool has_sibling(const Node& node) const { return ((node.index ^ 1) << node.level) < groups_; }
  std::vector<Node>::iterator find(int level, int64_t index);
  void add_group(int64_t group, std::byte* x) const;  // sums the group's tasks into the first one

  const OpTable& table_;
  const Arg arg_;
  void* const out_;
  const std::byte* const w_;
  const int64_t tasks_, size_, group_, groups_;
  const int levels_;
  std::mutex mutex_;              // guards the members below
  std::vector<std::byte*> idle_;  // last in, first out: the latest is still in cache
  std::vector<Node> waiting_;     // nodes whose siblings are not done
  int64_t taken_ = 0;             // groups
};

}  // namespace fastmaml
