// Launches kernels/update_rule.cuh: inner optimizers other than plain gradient descent.     all [P]
#include "cuda/cuda_ops.h"
#include "cuda/kernels/update_rule.cuh"
#include "cuda/map.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

constexpr int kClipThreads = 512;

bool wide_vectors(const Call& call, size_t real_bytes, int count) {
  for (int i = 0; i < count; ++i)
    if (reinterpret_cast<uintptr_t>(call[i].data) % 16 != 0 || call[i].task_stride * int64_t(real_bytes) % 16 != 0) return false;
  return true;
}

template <class T>
void run_clip_norm(const Call& call) {
  const Clip& clip = call.shape<Clip>();
  check_sizes("clip_norm", {clip.size});
  launch(clip_norm<T, kClipThreads>, dim3(unsigned(call.tasks)), dim3(kClipThreads), 0, call.stream, operand<T>(call, 0),
         operand<const T>(call, 1), operand<const T>(call, 2), clip.limit, int(clip.size), wide_vectors(call, sizeof(T), 3));
}

template <class T>
void run_clip_norm_adjoint(const Call& call) {
  const Clip& clip = call.shape<Clip>();
  check_sizes("clip_norm_adjoint", {clip.size});
  launch(clip_norm_adjoint<T, kClipThreads>, dim3(unsigned(call.tasks)), dim3(kClipThreads), 0, call.stream, operand<T>(call, 0),
         operand<const T>(call, 1), operand<const T>(call, 2), operand<const T>(call, 3), clip.limit, int(clip.size),
         wide_vectors(call, sizeof(T), 4));
}

}  // namespace

template <class T>
void add_update_rule_ops(OpTable& table) {
  set_map<T, Op::axpy>(table);
  set_map<T, Op::proximal>(table);
  set_map<T, Op::clip_value>(table);
  set_map<T, Op::clip_value_adjoint>(table);
  set_op(table, Op::clip_norm, run_clip_norm<T>);
  set_op(table, Op::clip_norm_adjoint, run_clip_norm_adjoint<T>);
  set_map<T, Op::momentum_update>(table);
  set_map<T, Op::momentum_adjoint>(table);
  set_map<T, Op::adam_update>(table);
  set_map<T, Op::adam_adjoint>(table);
}
template void add_update_rule_ops<float>(OpTable&);
template void add_update_rule_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
