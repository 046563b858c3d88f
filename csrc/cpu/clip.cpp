// Clipping of a gradient by value or by norm, and the adjoint. Formulas: ALGORITHMS 1.2, reference/clip.cpp.
#include <cmath>

#include "cpu/cpu.h"

FASTMAML_CPU_BEGIN
namespace {

const Clip& clip_of(const Call& call) { return *std::get_if<Clip>(&call.layer); }

template <class T>
void clip_value(const Call& call) {
  const Clip& clip = clip_of(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* clipped = at<T>(call, 0, t);
    const T* g = at<T>(call, 1, t);
    for_lanes<T>(clip.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V high = broadcast<V>(T(clip.limit)), low = -high;
      V x = load<V>(g + i);  // a NaN fails both comparisons and stays
      x = x > high ? high : x;
      store(clipped + i, x < low ? low : x);
    });
  }
}

template <class T>
void clip_value_adjoint(const Call& call) {
  const Clip& clip = clip_of(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* u_raw = at<T>(call, 0, t);
    const T *u = at<T>(call, 1, t), *g = at<T>(call, 2, t);
    for_lanes<T>(clip.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V x = load<V>(g + i), size = x < V{} ? -x : x;
      store(u_raw + i, size <= broadcast<V>(T(clip.limit)) ? load<V>(u + i) : V{});
    });
  }
}

// The entries that count: where there is a mask, those with mask != 0.
template <class V, class T>
V counted(const T* g, const T* mask, int64_t i) {
  const V x = load<V>(g + i);
  if (!mask) return x;
  return load<V>(mask + i) != V{} ? x : V{};
}

template <class T>
double norm(const T* g, const T* mask, int64_t size) {
  return std::sqrt(block_sum<T>(size, [&](auto lane, int64_t i) {
    const auto x = counted<decltype(lane)>(g, mask, i);
    return x * x;
  }));
}

template <class T>
void clip_norm(const Call& call) {
  const Clip& clip = clip_of(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* clipped = at<T>(call, 0, t);
    const T *g = at<T>(call, 1, t), *mask = at<T>(call, 2, t);
    const double n = norm(g, mask, clip.size);
    const T scale = T(n > clip.limit ? clip.limit / n : 1.0);
    for_lanes<T>(clip.size, [&](auto lane, int64_t i) { store(clipped + i, scale * load<decltype(lane)>(g + i)); });
  }
}

template <class T>
void clip_norm_adjoint(const Call& call) {
  const Clip& clip = clip_of(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* u_raw = at<T>(call, 0, t);
    const T *u = at<T>(call, 1, t), *g = at<T>(call, 2, t), *mask = at<T>(call, 3, t);
    const double n = norm(g, mask, clip.size);
    if (!(n > clip.limit)) {
      std::memcpy(u_raw, u, size_t(clip.size) * sizeof(T));
      continue;
    }
    const double along =
        block_sum<T>(clip.size, [&](auto lane, int64_t i) { return load<decltype(lane)>(g + i) * load<decltype(lane)>(u + i); });
    const T scale = T(clip.limit / n), part = T(along / n / n);
    for_lanes<T>(clip.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(u_raw + i, scale * (load<V>(u + i) - part * counted<V>(g, mask, i)));
    });
  }
}

}  // namespace

template <class T>
void add_clip_ops(OpTable& table) {
  set_op(table, Op::clip_value, clip_value<T>);
  set_op(table, Op::clip_value_adjoint, clip_value_adjoint<T>);
  set_op(table, Op::clip_norm, clip_norm<T>);
  set_op(table, Op::clip_norm_adjoint, clip_norm_adjoint<T>);
}
template void add_clip_ops<float>(OpTable&);
template void add_clip_ops<double>(OpTable&);

FASTMAML_CPU_END
