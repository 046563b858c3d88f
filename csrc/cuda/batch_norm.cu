// Batch norm of [examples, spatial, C]. The first stat_examples give the statistics.
#include "cuda/columns.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernels/batch_norm.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

struct Sizes {
  const BatchNorm& s;
  const int64_t C, rows, stat_rows;
  Sizes(const Step& step, const Layer& layer)
      : s(std::get<BatchNorm>(layer)), C(s.C), rows(step.examples * s.spatial), stat_rows(step.stat_examples * s.spatial) {}
  explicit Sizes(const Call& call) : Sizes(call.step, call.layer) {}
};

template <class T>
size_t stat_scratch_bytes(const Step& step, const Layer& layer) {
  const Sizes z(step, layer);
  return column_scratch_bytes<T>(z.stat_rows, z.C);
}

template <class T>
size_t scratch_bytes(const Step& step, const Layer& layer) {
  const Sizes z(step, layer);
  return column_scratch_bytes<T>(z.rows, z.C);
}

// May all these operands, [rows, C] each, be read and written in chunks?
template <class T>
bool all_wide(const Call& call, int64_t C, std::initializer_list<int> operands) {
  return std::all_of(operands.begin(), operands.end(), [&](int i) { return wide(operand<const T>(call, i), C); });
}

constexpr int kChannelThreads = 128;
dim3 channel_grid(int64_t tasks, int64_t C) { return dim3(unsigned(tasks), unsigned((C + kChannelThreads - 1) / kChannelThreads)); }

template <class T>
void run_stats(const Call& call) {
  const Sizes z(call);
  check_sizes("batch_norm", {z.rows * z.C});
  const Columns s = choose_column_sum(z.stat_rows, z.C, kChunk<T>);
  for_column_parts<T>(call, s, [&](int64_t first, int64_t tasks, double* parts) {
    const PerTask<T> stats = from_task(operand<T>(call, 0), first);
    const PerTask<const T> x = from_task(operand<const T>(call, 1), first);
    launch(batch_norm_stats<T>, column_grid<T>(s, tasks), column_block(s), 0, call.stream, stats, x, z.s.eps, parts, s, wide(x, z.C));
    if (parts)
      launch(batch_norm_stats_of_parts<T>, channel_grid(tasks, z.C), dim3(kChannelThreads), 0, call.stream, stats, z.s.eps, parts, s);
  });
}

template <class T>
void run_frozen_stats(const Call& call) {
  const Sizes z(call);
  launch(batch_norm_frozen_stats<T>, channel_grid(call.tasks, z.C), dim3(kChannelThreads), 0, call.stream, operand<T>(call, 0),
         operand<const T>(call, 1), operand<const T>(call, 2), z.s.eps, int(z.C));
}

template <class T>
void run_stats_jvp(const Call& call) {
  const Sizes z(call);
  const PerTask<T> stats_dot = operand<T>(call, 0), second{stats_dot.data + z.C, stats_dot.task_stride};
  const auto f = [&](int64_t first) {
    const auto in = [&](int i) { return from_task(operand<const T>(call, i), first); };
    return BatchNormStatsJvp<T>{in(1), in(2), in(3), int(z.C)};
  };
  launch_column_sums<T>(call, f, stats_dot, second, 1.0 / double(z.stat_rows), z.stat_rows, z.C, all_wide<T>(call, z.C, {1, 2}));
}

template <class T>
void run_fwd(const Call& call) {
  const Sizes z(call);
  const auto in = [&](int i) { return operand<const T>(call, i); };
  const BatchNormFwd<T> f{operand<T>(call, 0), in(1), in(2), in(3), in(4), int(z.C)};
  launch_column_map<T>(call, f, z.rows, z.C, all_wide<T>(call, z.C, {0, 1}));
}

template <class T>
void run_fwd_jvp(const Call& call) {
  const Sizes z(call);
  const auto in = [&](int i) { return operand<const T>(call, i); };
  const BatchNormFwdJvp<T> f{operand<T>(call, 0), in(1), in(2), in(3), in(4), in(5), in(6), in(7), int(z.C)};
  launch_column_map<T>(call, f, z.rows, z.C, all_wide<T>(call, z.C, {0, 1, 2}));
}

template <class T>
void run_bwd_weight(const Call& call) {
  const Sizes z(call);
  const auto f = [&](int64_t first) {
    const auto in = [&](int i) { return from_task(operand<const T>(call, i), first); };
    return BatchNormBwdWeight<T>{in(2), in(3), in(4), int(z.C)};
  };
  launch_column_sums<T>(call, f, operand<T>(call, 0), operand<T>(call, 1), 1.0, z.rows, z.C, all_wide<T>(call, z.C, {2, 3}));
}

template <class T>
void run_bwd_weight_jvp(const Call& call) {
  const Sizes z(call);
  const auto f = [&](int64_t first) {
    const auto in = [&](int i) { return from_task(operand<const T>(call, i), first); };
    return BatchNormBwdWeightJvp<T>{in(2), in(3), in(4), in(5), in(6), in(7), int(z.C)};
  };
  launch_column_sums<T>(call, f, operand<T>(call, 0), operand<T>(call, 1), 1.0, z.rows, z.C, all_wide<T>(call, z.C, {2, 3, 4, 5}));
}

int inside_rows(const Sizes& z) { return z.s.frozen ? 0 : int(z.stat_rows); }

template <class T>
void run_bwd_data(const Call& call) {
  const Sizes z(call);
  const auto in = [&](int i) { return operand<const T>(call, i); };
  const T over = T(1.0 / double(z.stat_rows));
  const BatchNormBwdData<T> f{operand<T>(call, 0), in(1), in(2), in(3), in(4), in(5), in(6), int(z.C), inside_rows(z), over};
  launch_column_map<T>(call, f, z.rows, z.C, all_wide<T>(call, z.C, {0, 1, 2}));
}

template <class T>
void run_bwd_data_jvp(const Call& call) {
  const Sizes z(call);
  const auto in = [&](int i) { return operand<const T>(call, i); };
  const T over = T(1.0 / double(z.stat_rows));
  const BatchNormBwdDataJvp<T> f{
      operand<T>(call, 0), in(1), in(2), in(3), in(4), in(5), in(6), in(7), in(8), in(9), in(10), in(11), in(12), int(z.C),
      inside_rows(z),      over};
  launch_column_map<T>(call, f, z.rows, z.C, all_wide<T>(call, z.C, {0, 1, 2, 3, 4}));
}

}  // namespace

template <class T>
void add_batch_norm_ops(OpTable& table) {
  set_op(table, Op::batch_norm_stats, run_stats<T>, stat_scratch_bytes<T>);
  set_op(table, Op::batch_norm_frozen_stats, run_frozen_stats<T>);
  set_op(table, Op::batch_norm_stats_jvp, run_stats_jvp<T>, stat_scratch_bytes<T>);
  set_op(table, Op::batch_norm_fwd, run_fwd<T>);
  set_op(table, Op::batch_norm_fwd_jvp, run_fwd_jvp<T>);
  set_op(table, Op::batch_norm_bwd_weight, run_bwd_weight<T>, scratch_bytes<T>);
  set_op(table, Op::batch_norm_bwd_weight_jvp, run_bwd_weight_jvp<T>, scratch_bytes<T>);
  set_op(table, Op::batch_norm_bwd_data, run_bwd_data<T>);
  set_op(table, Op::batch_norm_bwd_data_jvp, run_bwd_data_jvp<T>);
}
template void add_batch_norm_ops<float>(OpTable&);
template void add_batch_norm_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
