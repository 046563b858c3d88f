// Group norm of [N, spatial, channels], and layer norm.
#include "cuda/columns.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernels/group_norm.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

struct Sizes {
  const GroupNorm& s;
  const int64_t N, rows;
  Sizes(const Step& step, const Layer& layer) : s(std::get<GroupNorm>(layer)), N(step.examples), rows(N * s.spatial) {}
  explicit Sizes(const Call& call) : Sizes(call.step, call.layer) { check_sizes("group_norm", {rows * s.channels}); }

  template <class T>
  Groups groups() const {
    const int64_t width = s.channels / s.groups;
    return {int(N), int(s.spatial), int(s.channels), int(s.groups), int(width), int((width + kChunk<T> - 1) / kChunk<T>)};
  }
};

template <class T>
size_t scratch_bytes(const Step& step, const Layer& layer) {
  const Sizes z(step, layer);
  return column_scratch_bytes<T>(z.rows, z.s.channels);
}

template <class T>
Mask<T> mask(const Call& call, int y) {
  return {operand<const T>(call, y), {T(rectified_output(call.layer).slope)}};
}

// May every pixel of a group be read and written in chunks, in all these operands?
template <class T>
bool all_wide(const Call& call, int64_t length, std::initializer_list<int> operands) {
  return std::all_of(operands.begin(), operands.end(), [&](int i) { return wide(operand<const T>(call, i), length); });
}

template <class T, class F>
void launch_groups(const Call& call, const F& f, std::initializer_list<int> operands) {
  const Sizes z(call);
  const Groups s = z.groups<T>();
  const int64_t chunks = int64_t(s.spatial) * s.chunks;
  const int64_t threads = std::clamp<int64_t>((chunks + 63) / 64 * 32, 32, 256);  // at least two chunks for each thread
  launch(map_groups<F>, dim3(unsigned(call.tasks), unsigned(std::min<int64_t>(z.N * s.groups, 65535))), dim3(unsigned(threads)), 0,
         call.stream, f, s, all_wide<T>(call, s.width, operands));
}

template <class T>
void run_fwd(const Call& call) {
  const auto in = [&](int i) { return operand<const T>(call, i); };
  const GroupNorm& s = Sizes(call).s;
  const GroupNormFwd<T> f{operand<T>(call, 0), operand<T>(call, 1), in(2), in(3), in(4), s.eps, s.y.on, {T(s.y.slope)}};
  launch_groups<T>(call, f, {0, 2});
}

template <class T>
void run_fwd_jvp(const Call& call) {
  const auto in = [&](int i) { return operand<const T>(call, i); };
  const GroupNormFwdJvp<T> f{operand<T>(call, 0), operand<T>(call, 1), in(2), in(3), in(4), in(5), in(6), in(7), mask<T>(call, 8)};
  launch_groups<T>(call, f, {0, 2, 3, 8});
}

template <class T>
void run_bwd(const Call& call) {
  const Sizes z(call);
  const auto in = [&](int i) { return operand<const T>(call, i); };
  if (call[0]) launch_groups<T>(call, GroupNormBwdData<T>{operand<T>(call, 0), in(3), in(4), in(5), in(6), mask<T>(call, 7)}, {0, 3, 4, 7});
  const auto f = [&](int64_t first) {
    Mask<T> by = mask<T>(call, 7);
    by.y = from_task(by.y, first);
    return GroupNormBwdWeight<T>{from_task(in(3), first), from_task(in(4), first), from_task(in(5), first), z.groups<T>(), by};
  };
  launch_column_sums<T>(call, f, operand<T>(call, 1), operand<T>(call, 2), 1.0, z.rows, z.s.channels,
                        all_wide<T>(call, z.s.channels, {3, 4, 7}));
}

template <class T>
void run_bwd_jvp(const Call& call) {
  const Sizes z(call);
  const auto in = [&](int i) { return operand<const T>(call, i); };
  if (call[0]) {
    const GroupNormBwdDataJvp<T> data{operand<T>(call, 0), in(3), in(4), in(5), in(6), in(7), in(8), in(9), in(10), mask<T>(call, 11)};
    launch_groups<T>(call, data, {0, 3, 4, 5, 6, 11});
  }
  const auto f = [&](int64_t first) {
    const auto from = [&](int i) { return from_task(in(i), first); };
    Mask<T> by = mask<T>(call, 11);
    by.y = from_task(by.y, first);
    return GroupNormBwdWeightJvp<T>{from(3), from(4), from(5), from(6), from(7), from(8), z.groups<T>(), by};
  };
  launch_column_sums<T>(call, f, operand<T>(call, 1), operand<T>(call, 2), 1.0, z.rows, z.s.channels,
                        all_wide<T>(call, z.s.channels, {3, 4, 5, 6, 11}));
}

}  // namespace

template <class T>
void add_group_norm_ops(OpTable& table) {
  set_op(table, Op::group_norm_fwd, run_fwd<T>);
  set_op(table, Op::group_norm_fwd_jvp, run_fwd_jvp<T>);
  set_op(table, Op::group_norm_bwd, run_bwd<T>, scratch_bytes<T>);
  set_op(table, Op::group_norm_bwd_jvp, run_bwd_jvp<T>, scratch_bytes<T>);
}
template void add_group_norm_ops<float>(OpTable&);
template void add_group_norm_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
