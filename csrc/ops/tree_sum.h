// The sum over tasks of one result, in the order of OpTable::tree_reduce, added up while the tasks are walked: a task's numbers are still
// in a cache, and only a few tasks' are held at once.
#pragma once

#include <mutex>
#include <vector>

#include "ops/ops.h"

namespace fastmaml {

class TreeSum {
 public:
  // out = sum_t w[t] x[t] (w null: the mean) of x [tasks, size], which `workers` workers make in groups of `group` tasks, a power of two.
  // memory: room(..) bytes, 64-byte aligned.
  TreeSum(const OpTable& table, Arg arg, void* out, const void* w, int64_t tasks, int64_t size, int64_t group, int workers, void* memory);
  static size_t room(const OpTable& table, int64_t tasks, int64_t size, int64_t group, int workers);

  Arg arg() const { return arg_; }
  int64_t size() const { return size_; }

  // Every worker, for every group: where the group's tasks put their x, and then that they are there.
  void* take();
  void give(int64_t group, void* x);
  // When every group was given: adds up what is left.
  void finish(int workers, const ParallelFor& parallel_for);

 private:
  struct Node {
    int level;      // it covers 2^level groups,
    int64_t index;  // from number index 2^level on
    std::byte* sum;
  };
  static int levels(int64_t groups);
  static int64_t places(int64_t groups, int workers);
  bool has_sibling(const Node& node) const { return ((node.index ^ 1) << node.level) < groups_; }
  std::vector<Node>::iterator find(int level, int64_t index);
  void add_group(int64_t group, std::byte* x) const;  // into its first task's

  const OpTable& table_;
  const Arg arg_;
  void* const out_;
  const std::byte* const w_;
  const int64_t tasks_, size_, group_, groups_;
  const int levels_;
  std::mutex mutex_;              // of what follows
  std::vector<std::byte*> idle_;  // the last given back is the next taken: it is in a cache
  std::vector<Node> waiting_;     // for their siblings
  int64_t taken_ = 0;             // groups
};

}  // namespace fastmaml
