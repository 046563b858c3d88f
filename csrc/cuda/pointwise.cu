// Pointwise functions of [N, size].
#include "cuda/cuda_ops.h"
#include "cuda/map.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

template <class T, Op op>
void run_pointwise(const Call& call) {
  if (is_rectifier(call.shape<Pointwise>().kind))
    run_map<PointwiseOp<T, op, Rectifying<T>>>(call);
  else
    run_map<PointwiseOp<T, op, Smoothing<T>>>(call);
}

}  // namespace

template <class T>
void add_pointwise_ops(OpTable& table) {
  set_op(table, Op::pointwise_fwd, run_pointwise<T, Op::pointwise_fwd>);
  set_op(table, Op::pointwise_fwd_jvp, run_pointwise<T, Op::pointwise_fwd_jvp>);
  set_op(table, Op::pointwise_bwd, run_pointwise<T, Op::pointwise_bwd>);
  set_op(table, Op::pointwise_bwd_jvp, run_pointwise<T, Op::pointwise_bwd_jvp>);
}
template void add_pointwise_ops<float>(OpTable&);
template void add_pointwise_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
