// Batch norm, max-pool and ReLU or leaky ReLU as one op. batch_norm.cu computes the statistics.
#include <type_traits>

#include "cuda/columns.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernels/norm_pool_act.cuh"
#include "cuda/pool_sizes.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

struct Sizes {
  const NormPoolAct& s;
  const int64_t C, pixels, windows;  // of all examples
  Sizes(const Step& step, const Layer& layer)
      : s(std::get<NormPoolAct>(layer)),
        C(s.norm.C),
        pixels(step.examples * s.pool.H * s.pool.W),
        windows(step.examples * s.pool.OH * s.pool.OW) {}
  explicit Sizes(const Call& call) : Sizes(call.step, call.layer) {}

  template <class T>
  Rectifier<T> act() const {
    return {T(s.slope)};
  }
  bool side_by_side() const { return windows_side_by_side(s.pool); }
};

PoolSizes pool_of(const Call& call) { return pool_sizes(call.shape<NormPoolAct>().pool, call.step.examples); }

template <class T>
size_t scratch_bytes(const Step& step, const Layer& layer) {
  const Sizes z(step, layer);
  return column_scratch_bytes<T>(z.windows, z.C);
}

// May all these operands be read and written in chunks? Absent ones may.
template <class T>
bool all_wide(const Call& call, int64_t C, std::initializer_list<int> operands) {
  return std::all_of(operands.begin(), operands.end(), [&](int i) { return wide(operand<const T>(call, i), C); });
}

// A chunk of taps has as many bytes as a chunk of T has numbers.
template <class T>
bool wide_taps(const PerTask<const Tap>& tap) {
  return reinterpret_cast<uintptr_t>(tap.data) % kChunk<T> == 0 && tap.task_stride % kChunk<T> == 0;
}

// Calls body(kSide) for the layer's windows.
template <class Body>
void with_side(const NormPoolAct& s, Body body) {
  if (!s.pooled) return body(std::integral_constant<int, 1>());
  if (s.pool.KH == 2 && s.pool.KW == 2) return body(std::integral_constant<int, 2>());
  body(std::integral_constant<int, 0>());
}

template <class T>
void run_fwd(const Call& call) {
  const Sizes z(call);
  const auto in = [&](int i) { return operand<const T>(call, i); };
  const PerTask<Tap> tap = operand<Tap>(call, 1);
  const bool wide = all_wide<T>(call, z.C, {0, 2, 3}) && wide_taps<T>({tap.data, tap.task_stride});
  with_side(z.s, [&](auto side) {
    const NormPoolActFwd<T, side()> f{operand<T>(call, 0), tap, operand<T>(call, 2), in(3), in(4), in(5), in(6), z.act<T>(), pool_of(call)};
    launch_column_map<T>(call, f, z.windows, z.C, wide);
  });
}

template <class T>
void run_fwd_jvp(const Call& call) {
  const Sizes z(call);
  const auto in = [&](int i) { return operand<const T>(call, i); };
  const PerTask<const Tap> tap = operand<const Tap>(call, 2);
  const bool wide = all_wide<T>(call, z.C, {0, 1, 3, 4}) && wide_taps<T>(tap);
  with_side(z.s, [&](auto side) {
    const NormPoolActFwdJvp<T, side()> f{
        operand<T>(call, 0), operand<T>(call, 1), tap, in(3), in(4), in(5), in(6), in(7), in(8), in(9), in(10), z.act<T>(), pool_of(call)};
    launch_column_map<T>(call, f, z.windows, z.C, wide);
  });
}

template <class T>
void run_bwd_weight(const Call& call) {
  const Sizes z(call);
  const auto f = [&](int64_t first) {
    const auto in = [&](int i) { return from_task(operand<const T>(call, i), first); };
    return NormPoolActBwdWeight<T>{in(2), in(3), in(4), in(5), in(6), z.act<T>(), int(z.C)};
  };
  launch_column_sums<T>(call, f, operand<T>(call, 0), operand<T>(call, 1), 1.0, z.windows, z.C, all_wide<T>(call, z.C, {2, 3}));
}

template <class T>
void run_bwd_weight_jvp(const Call& call) {
  const Sizes z(call);
  const auto f = [&](int64_t first) {
    const auto in = [&](int i) { return from_task(operand<const T>(call, i), first); };
    return NormPoolActBwdWeightJvp<T>{in(2), in(3), in(4), in(5), in(6), in(7), in(8), in(9), z.act<T>(), int(z.C)};
  };
  launch_column_sums<T>(call, f, operand<T>(call, 0), operand<T>(call, 1), 1.0, z.windows, z.C, all_wide<T>(call, z.C, {2, 3, 4, 5}));
}

template <class T, class F>
void launch_bwd_data(const Call& call, const Sizes& z, const F& f, bool wide) {
  const PerTask<const Tap> tap = operand<const Tap>(call, 1);
  const PoolSizes s = pool_of(call);
  wide = wide && wide_taps<T>(tap);
  if (!z.side_by_side()) return launch_column_map<T>(call, NormPoolActBwdWindows<T, F>{f, tap, s}, z.pixels, z.C, wide);
  const int64_t tiles = int64_t(s.N) * ((s.H + s.KH - 1) / s.KH) * ((s.W + s.KW - 1) / s.KW);
  with_side(z.s, [&](auto side) { launch_column_map<T>(call, NormPoolActBwdTiles<T, F, side()>{f, tap, s}, tiles, z.C, wide); });
}

// Numbers of x in the examples that give the statistics.
int inside(const Call& call, const Sizes& z) { return z.s.norm.frozen ? 0 : int(call.step.stat_examples * z.s.norm.spatial * z.C); }

template <class T>
T over(const Call& call, const Sizes& z) {
  return T(1.0 / double(call.step.stat_examples * z.s.norm.spatial));
}

template <class T>
void run_bwd_data(const Call& call) {
  const Sizes z(call);
  const auto in = [&](int i) { return operand<const T>(call, i); };
  const NormPoolActBwdData<T> f{operand<T>(call, 0), in(2),    {in(3)},         in(4),           in(5), in(6), in(7), in(8),
                                z.act<T>(),          int(z.C), inside(call, z), over<T>(call, z)};
  launch_bwd_data<T>(call, z, f, all_wide<T>(call, z.C, {0, 2, 3}));
}

template <class T>
void run_bwd_data_jvp(const Call& call) {
  const Sizes z(call);
  const auto in = [&](int i) { return operand<const T>(call, i); };
  const NormPoolActBwdDataJvp<T> f{
      operand<T>(call, 0), in(2),    in(3),           {in(4), in(5)},  in(6), in(7), in(8), in(9), in(10), in(11), in(12), in(13), in(14),
      z.act<T>(),          int(z.C), inside(call, z), over<T>(call, z)};
  launch_bwd_data<T>(call, z, f, all_wide<T>(call, z.C, {0, 2, 3, 4, 5}));
}

}  // namespace

template <class T>
void add_norm_pool_act_ops(OpTable& table) {
  set_op(table, Op::norm_pool_act_fwd, run_fwd<T>);
  set_op(table, Op::norm_pool_act_fwd_jvp, run_fwd_jvp<T>);
  set_op(table, Op::norm_pool_act_bwd_weight, run_bwd_weight<T>, scratch_bytes<T>);
  set_op(table, Op::norm_pool_act_bwd_weight_jvp, run_bwd_weight_jvp<T>, scratch_bytes<T>);
  set_op(table, Op::norm_pool_act_bwd_data, run_bwd_data<T>);
  set_op(table, Op::norm_pool_act_bwd_data_jvp, run_bwd_data_jvp<T>);
}
template void add_norm_pool_act_ops<float>(OpTable&);
template void add_norm_pool_act_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
