// Pointwise functions of [N, size].
#include "cuda/cuda_ops.h"
#include "cuda/kernels/pointwise.cuh"
#include "cuda/map.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

using Kind = Pointwise::Kind;

bool rectifies(const Pointwise& s) { return s.kind == Kind::relu || s.kind == Kind::leaky_relu; }

template <class T>
Rectifier<T> rectifier(const Pointwise& s) {
  return {s.kind == Kind::relu ? T(0) : T(s.slope)};
}

template <class T>
SmoothFunction<T> smooth(const Pointwise& s) {
  switch (s.kind) {
    case Kind::tanh:
      return {Smooth::tanh};
    case Kind::sigmoid:
      return {Smooth::sigmoid};
    case Kind::silu:
      return {Smooth::silu};
    case Kind::gelu:
      return {Smooth::gelu};
    default:
      return {Smooth::gelu_tanh};
  }
}

template <class T>
void pointwise_fwd(const Call& call) {
  const Pointwise& s = call.shape<Pointwise>();
  const int64_t size = call.step.examples * s.size;
  if (rectifies(s)) return run_map<T>(call, PointwiseFwd<Rectifier<T>>{rectifier<T>(s)}, size);
  run_map<T>(call, PointwiseFwd<SmoothFunction<T>>{smooth<T>(s)}, size);
}

// f'(x) d of the operands out, x, d
template <class T>
void times_first(const Call& call) {
  const Pointwise& s = call.shape<Pointwise>();
  const int64_t size = call.step.examples * s.size;
  if (rectifies(s)) return run_map<T>(call, PointwiseTimesFirst<Rectifier<T>>{rectifier<T>(s)}, size);
  run_map<T>(call, PointwiseTimesFirst<SmoothFunction<T>>{smooth<T>(s)}, size);
}

template <class T>
void pointwise_bwd_jvp(const Call& call) {
  const Pointwise& s = call.shape<Pointwise>();
  const int64_t size = call.step.examples * s.size;
  if (!rectifies(s)) return run_map<T>(call, SmoothBwdJvp<T>{smooth<T>(s)}, size);
  const PerTask<const T> x = operand<const T>(call, 1), dy_dot = operand<const T>(call, 4);
  launch_map<T>(call, PointwiseTimesFirst<Rectifier<T>>{rectifier<T>(s)}, {{operand<T>(call, 0)}, {x, dy_dot}}, size);
}

}  // namespace

template <class T>
void add_pointwise_ops(OpTable& table) {
  set_op(table, Op::pointwise_fwd, pointwise_fwd<T>);
  set_op(table, Op::pointwise_fwd_jvp, times_first<T>);
  set_op(table, Op::pointwise_bwd, times_first<T>);
  set_op(table, Op::pointwise_bwd_jvp, pointwise_bwd_jvp<T>);
}
template void add_pointwise_ops<float>(OpTable&);
template void add_pointwise_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
