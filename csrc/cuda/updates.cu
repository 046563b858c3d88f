// The inner update and its adjoint, conjugate gradients, and the sum over tasks.     all [P]
#include <stdexcept>

#include "cuda/cuda_ops.h"
#include "cuda/kernels/conjugate_gradient.cuh"
#include "cuda/kernels/updates.cuh"
#include "cuda/map.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

int64_t size_of(const Call& call) { return call.shape<Vector>().size; }

constexpr int kCgThreads = 512;

bool wide_operands(const Call& call, size_t real_bytes, std::initializer_list<int> operands) {
  for (int i : operands)
    if (reinterpret_cast<uintptr_t>(call[i].data) % 16 != 0 || call[i].task_stride * int64_t(real_bytes) % 16 != 0) return false;
  return true;
}

template <class T>
void run_cg_start(const Call& call) {
  check_sizes("cg_start", {size_of(call)});
  launch(cg_start<T, kCgThreads>, dim3(unsigned(call.tasks)), dim3(kCgThreads), 0, call.stream, operand<T>(call, 0), operand<T>(call, 1),
         operand<T>(call, 2), operand<T>(call, 3), operand<T>(call, 4), operand<const T>(call, 5), int(size_of(call)),
         wide_operands(call, sizeof(T), {0, 1, 2, 5}));
}

template <class T>
void run_cg_step(const Call& call) {
  check_sizes("cg_step", {size_of(call)});
  launch(cg_step<T, kCgThreads>, dim3(unsigned(call.tasks)), dim3(kCgThreads), 0, call.stream, operand<T>(call, 0), operand<T>(call, 1),
         operand<T>(call, 2), operand<T>(call, 3), operand<T>(call, 4), operand<const T>(call, 5), operand<const T>(call, 6),
         int(size_of(call)), wide_operands(call, sizeof(T), {0, 1, 2, 5}));
}

template <class T>
void run_tree_reduce(void* out, void* x, const void* w, int64_t tasks, int64_t size, int64_t stride, uintptr_t stream) {
  if (stride != size) throw std::logic_error("tree_reduce takes whole vectors on a device");
  constexpr int kColumns = 32, kSlices = 8;
  int64_t slice = 8;  // tasks of one thread; the tree is the same for any value
  while (slice * kSlices < tasks) slice *= 2;
  if (size == 0) return;
  launch(tree_reduce<T, kColumns, kSlices>, dim3(unsigned((size + kColumns - 1) / kColumns)), dim3(kColumns, kSlices), 0, stream,
         static_cast<T*>(out), static_cast<const T*>(x), static_cast<const T*>(w), tasks, size, slice);
}

}  // namespace

template <class T>
void add_update_ops(OpTable& table) {
  set_map<T, Op::sgd_update>(table);
  set_map<T, Op::scale_by_rate>(table);
  set_map<T, Op::rate_grad>(table);
  set_map<T, Op::adjoint_update>(table);
  set_map<T, Op::sgd_adjoint>(table);
  set_op(table, Op::cg_start, run_cg_start<T>);
  set_op(table, Op::cg_step, run_cg_step<T>);
  table.tree_reduce = run_tree_reduce<T>;
}
template void add_update_ops<float>(OpTable&);
template void add_update_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
