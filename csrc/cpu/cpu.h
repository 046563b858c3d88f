// Shared by the files of cpu/: one task's operands as plain pointers, and the functions that fill the table by op family.
#pragma once

#include "cpu/vec.h"
#include "ops/ops.h"

FASTMAML_CPU_BEGIN

// Task t's operand i; null where absent.
template <class T>
inline T* at(const Call& call, int i, int64_t t) {
  const View& view = call.operand[i];
  return view.data ? static_cast<T*>(view.data) + t * view.task_stride : nullptr;
}

// Hands out the pieces of a Call's scratch. Over a null base, measures how much a Step needs.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<std::byte*>(base)) {}
  template <class U>
  U* take(int64_t n) {
    std::byte* at = base_ ? base_ + used_ : nullptr;
    used_ += (size_t(n) * sizeof(U) + 63) / 64 * 64;
    return reinterpret_cast<U*>(at);
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

template <class T>
void add_linear_ops(OpTable& table);  // linear.cpp
template <class T>
void add_conv2d_ops(OpTable& table);  // conv2d.cpp
template <class T>
void add_batch_norm_ops(OpTable& table);  // batch_norm.cpp
template <class T>
void add_norm_pool_act_ops(OpTable& table);  // norm_pool_act.cpp
template <class T>
void add_group_norm_ops(OpTable& table);  // group_norm.cpp
template <class T>
void add_pool2d_ops(OpTable& table);  // pool2d.cpp
template <class T>
void add_loss_ops(OpTable& table);  // loss.cpp

inline void set_op(OpTable& table, Op op, OpFn run, ScratchFn scratch = nullptr) {
  table.run[static_cast<int>(op)] = run;
  table.scratch[static_cast<int>(op)] = scratch;
}

FASTMAML_CPU_END
