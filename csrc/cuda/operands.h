// Shared by the launchers of all op families: a Call's operands as kernels take them, and size checks.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "cuda/kernels/operands.cuh"
#include "ops/ops.h"

namespace fastmaml::FASTMAML_CUDA_NS {

// Kernels count a task's numbers in 32 bits.
inline void check_sizes(const char* layer, std::initializer_list<int64_t> sizes) {
  for (int64_t size : sizes)
    if (size > int64_t(1) << 30) throw std::invalid_argument(std::string(layer) + ": more than 2^30 numbers a task");
}

template <class T>
PerTask<T> operand(const Call& call, int i) {
  return {static_cast<T*>(call[i].data), call[i].task_stride};
}

// May every line of `length` numbers be read and written in chunks?
template <class T>
bool wide(const PerTask<T>& x, int64_t length) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.task_stride % kChunk<T> == 0 && length % kChunk<T> == 0;
}

inline void set_op(OpTable& table, Op op, OpFn run, ScratchFn scratch = nullptr) {
  table.run[static_cast<int>(op)] = run;
  table.scratch[static_cast<int>(op)] = scratch;
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
