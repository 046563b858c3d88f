// max_pool2d and avg_pool2d of [N, H, W, C].
#include <algorithm>

#include "cuda/cuda_ops.h"
#include "cuda/launch.h"
#include "cuda/pool_sizes.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

PoolSizes sizes_of(const Call& call) { return pool_sizes(call.shape<Pool2d>(), call.step.examples); }

template <class T, class... Operands>
bool all_wide(int C, const Operands&... operands) {
  return C % kChunk<T> == 0 && (... && (reinterpret_cast<uintptr_t>(operands.data) % 16 == 0 && operands.task_stride % kChunk<T> == 0));
}

// One thread for every chunk of channels of `pixels`.
template <class T, class F>
void launch_pool(const Call& call, const F& f, int64_t pixels, bool wide) {
  const int64_t places = pixels * ((f.s.C + kChunk<T> - 1) / kChunk<T>);
  const int64_t threads = std::clamp<int64_t>((places + 31) / 32 * 32, 32, 256),
                blocks = std::min<int64_t>((places + threads - 1) / threads, 65535);
  launch(map_places<F>, dim3(unsigned(call.tasks), unsigned(blocks)), dim3(unsigned(threads)), 0, call.stream, f, int(places), wide);
}

int64_t pixels_in(const PoolSizes& s) { return int64_t(s.N) * s.H * s.W; }
int64_t pixels_out(const PoolSizes& s) { return int64_t(s.N) * s.OH * s.OW; }

template <class T>
void max_pool2d_fwd(const Call& call) {
  const MaxPool2dFwd<T> f{operand<T>(call, 0), operand<int>(call, 1), operand<const T>(call, 2), sizes_of(call)};
  launch_pool<T>(call, f, pixels_out(f.s), all_wide<T>(f.s.C, f.y, f.index, f.x));
}

template <class T>
void max_pool2d_fwd_jvp(const Call& call) {
  const MaxPool2dFwdJvp<T> f{operand<T>(call, 0), operand<const T>(call, 1), operand<const int>(call, 2), sizes_of(call)};
  launch_pool<T>(call, f, pixels_out(f.s), all_wide<T>(f.s.C, f.y_dot, f.index));
}

template <class T>
void max_pool2d_bwd(const Call& call) {
  const PerTask<T> dx = operand<T>(call, 0);
  const PerTask<const T> dy = operand<const T>(call, 1);
  const PerTask<const int> index = operand<const int>(call, 2);
  const PoolSizes s = sizes_of(call);
  const bool wide = all_wide<T>(s.C, dx, dy, index);
  if (windows_side_by_side(call.shape<Pool2d>()))
    launch_pool<T>(call, MaxPool2dBwdTiles<T>{dx, dy, index, s}, int64_t(s.N) * ((s.H + s.KH - 1) / s.KH) * ((s.W + s.KW - 1) / s.KW),
                   wide);
  else
    launch_pool<T>(call, MaxPool2dBwd<T>{dx, dy, index, s}, pixels_in(s), wide);
}

template <class T>
void avg_pool2d_fwd(const Call& call) {
  const AvgPool2dFwd<T> f{operand<T>(call, 0), operand<const T>(call, 1), sizes_of(call)};
  launch_pool<T>(call, f, pixels_out(f.s), all_wide<T>(f.s.C, f.y, f.x));
}

template <class T>
void avg_pool2d_bwd(const Call& call) {
  const AvgPool2dBwd<T> f{operand<T>(call, 0), operand<const T>(call, 1), sizes_of(call)};
  launch_pool<T>(call, f, pixels_in(f.s), all_wide<T>(f.s.C, f.dx, f.dy));
}

}  // namespace

template <class T>
void add_pool2d_ops(OpTable& table) {
  set_op(table, Op::max_pool2d_fwd, max_pool2d_fwd<T>);
  set_op(table, Op::max_pool2d_fwd_jvp, max_pool2d_fwd_jvp<T>);
  set_op(table, Op::max_pool2d_bwd, max_pool2d_bwd<T>);
  set_op(table, Op::avg_pool2d_fwd, avg_pool2d_fwd<T>);
  set_op(table, Op::avg_pool2d_bwd, avg_pool2d_bwd<T>);
}
template void add_pool2d_ops<float>(OpTable&);
template void add_pool2d_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
