// Launches of kernels/update_rule.cuh: the inner optimizers beside plain gradient descent.     all [P]
#include <cmath>

#include "cuda/cuda_ops.h"
#include "cuda/kernels/update_rule.cuh"
#include "cuda/map.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

// f's outputs and inputs by their places among the op's operands, and the place of the number it also takes.
template <class T, class F>
void run_with_number(const Call& call, const F& f, int64_t size, const int (&out)[F::kOut], const int (&in)[F::kIn], int number) {
  const char* name = op_name(call.step.op);
  check_sizes(name, {size});
  MapOperands<T, F> operands;
  bool aligned = true;
  for (int k = 0; k < F::kOut; ++k) aligned = wide(operands.out[k] = operand<T>(call, out[k]), 0) && aligned;
  for (int k = 0; k < F::kIn; ++k) aligned = wide(operands.x[k] = operand<const T>(call, in[k]), 0) && aligned;
  const Blocks blocks = blocks_of<T>(size);
  if (size > 0)
    launch(map_with_number<T, F>, dim3(unsigned(call.tasks), blocks.count), dim3(blocks.threads), 0, call.stream, f, operands,
           operand<const T>(call, number), int(size), aligned);
}

template <class T, class F>
void run_at(const Call& call, const F& f, int64_t size, const int (&out)[F::kOut], const int (&in)[F::kIn]) {
  MapOperands<T, F> operands;
  for (int k = 0; k < F::kOut; ++k) operands.out[k] = operand<T>(call, out[k]);
  for (int k = 0; k < F::kIn; ++k) operands.x[k] = operand<const T>(call, in[k]);
  launch_map<T>(call, f, operands, size);
}

template <class T>
void axpy(const Call& call) {
  const Axpy& shape = call.shape<Axpy>();
  run_with_number<T>(call, AxpyBy<T>{T(shape.factor)}, shape.size, {0}, {0, 2}, 1);
}

template <class T>
void proximal(const Call& call) {
  run_with_number<T>(call, ProximalBy<T>{}, call.shape<Vector>().size, {0}, {0, 2, 3}, 1);
}

template <class T>
void clip_value(const Call& call) {
  const Clip& clip = call.shape<Clip>();
  run_at<T>(call, ClipValue<T>{T(clip.limit)}, clip.size, {0}, {1});
}

template <class T>
void clip_value_adjoint(const Call& call) {
  const Clip& clip = call.shape<Clip>();
  run_at<T>(call, ClipValueAdjoint<T>{T(clip.limit)}, clip.size, {0}, {1, 2});
}

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

template <class T>
void momentum_update(const Call& call) {
  const Momentum& rule = call.shape<Momentum>();
  const MomentumUpdate<T> f{T(rule.momentum), T(1 - rule.dampening), rule.nesterov, rule.first};
  run_at<T>(call, f, rule.size, {0, 1, 2}, {3, 4, 5, 6});
}

template <class T>
void momentum_adjoint(const Call& call) {
  const Momentum& rule = call.shape<Momentum>();
  const MomentumAdjoint<T> f{T(rule.momentum), T(1 - rule.dampening), rule.nesterov, rule.first};
  run_at<T>(call, f, rule.size, {0, 1}, {1, 2, 3});
}

template <class T>
void adam_update(const Call& call) {
  const Adam& rule = call.shape<Adam>();
  const AdamUpdate<T> f{rule.beta1, rule.beta2, double(rule.step + 1), T(rule.eps), T(rule.decay)};
  run_with_number<T>(call, f, rule.size, {0, 1, 2}, {3, 4, 5, 6, 7}, 8);
}

template <class T>
void adam_adjoint(const Call& call) {
  const Adam& rule = call.shape<Adam>();
  const double t = double(rule.step + 1), over_c1 = 1 / (1 - std::pow(rule.beta1, t)), over_c2 = 1 / (1 - std::pow(rule.beta2, t));
  const AdamAdjoint<T> f{T(rule.beta1), T(rule.beta2), T(over_c1), T(over_c2), T(rule.eps), T(rule.decay)};
  run_at<T>(call, f, rule.size, {0, 1, 2, 3, 4}, {1, 2, 3, 4, 5, 6, 7, 8, 9});
}

}  // namespace

template <class T>
void add_update_rule_ops(OpTable& table) {
  set_op(table, Op::axpy, axpy<T>);
  set_op(table, Op::proximal, proximal<T>);
  set_op(table, Op::clip_value, clip_value<T>);
  set_op(table, Op::clip_value_adjoint, clip_value_adjoint<T>);
  set_op(table, Op::clip_norm, run_clip_norm<T>);
  set_op(table, Op::clip_norm_adjoint, run_clip_norm_adjoint<T>);
  set_op(table, Op::momentum_update, momentum_update<T>);
  set_op(table, Op::momentum_adjoint, momentum_adjoint<T>);
  set_op(table, Op::adam_update, adam_update<T>);
  set_op(table, Op::adam_adjoint, adam_adjoint<T>);
}
template void add_update_rule_ops<float>(OpTable&);
template void add_update_rule_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
