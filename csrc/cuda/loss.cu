// Losses of [N, size].
#include <algorithm>

#include "cuda/choose.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernels/loss.cuh"
#include "cuda/launch.h"
#include "cuda/operands.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

constexpr int kThreads = 128;

Examples examples_of(const Call& call) {
  const Loss& s = call.shape<Loss>();
  check_sizes("loss", {call.step.examples * s.size});
  return {int(call.step.examples), int(s.size), choose_loss_lanes(s.size)};
}

template <class T>
void run_cross_entropy(const Call& call) {
  launch(cross_entropy<T, kThreads>, dim3(unsigned(call.tasks)), dim3(kThreads), 0, call.stream, operand<T>(call, 0), operand<T>(call, 1),
         operand<const T>(call, 2), operand<const int64_t>(call, 3), operand<const T>(call, 4), call.shape<Loss>().smoothing,
         examples_of(call));
}

template <class T>
void run_cross_entropy_jvp(const Call& call) {
  const Examples s = examples_of(call);
  const int at_once = kThreads / s.lanes;
  launch(cross_entropy_jvp<T, kThreads>, dim3(unsigned(call.tasks), unsigned(std::min((s.N + at_once - 1) / at_once, 65535))),
         dim3(kThreads), 0, call.stream, operand<T>(call, 0), operand<const T>(call, 1), operand<const T>(call, 2),
         operand<const T>(call, 4), s);
}

template <class T>
void run_mse(const Call& call) {
  const Examples s = examples_of(call);
  launch(mse<T, kThreads>, dim3(unsigned(call.tasks)), dim3(kThreads), 0, call.stream, operand<T>(call, 0), operand<T>(call, 1),
         operand<const T>(call, 2), operand<const T>(call, 3), operand<const T>(call, 4), s.N, s.size);
}

template <class T>
void run_mse_jvp(const Call& call) {
  const Examples s = examples_of(call);
  const int blocks = std::min((s.N * s.size + kThreads - 1) / kThreads, 65535);
  launch(mse_jvp<T>, dim3(unsigned(call.tasks), unsigned(blocks)), dim3(kThreads), 0, call.stream, operand<T>(call, 0),
         operand<const T>(call, 2), operand<const T>(call, 4), s.N, s.size);
}

}  // namespace

template <class T>
void add_loss_ops(OpTable& table) {
  set_op(table, Op::cross_entropy, run_cross_entropy<T>);
  set_op(table, Op::cross_entropy_jvp, run_cross_entropy_jvp<T>);
  set_op(table, Op::mse, run_mse<T>);
  set_op(table, Op::mse_jvp, run_mse_jvp<T>);
}
template void add_loss_ops<float>(OpTable&);
template void add_loss_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
