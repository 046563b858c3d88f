// Clips a gradient by value or by norm, and the adjoints. Formulas: ALGORITHMS 1.2, reference/clip.cpp.
#include <cmath>

#include "cpu/layout.h"
#include "cpu/vec_math.h"

FASTMAML_CPU_BEGIN
namespace {

const Clip& clip_of(const Call& call) { return *std::get_if<Clip>(&call.layer); }

template <class Layout>
void clip_value(const Call& call) {
  using T = typename Layout::Type;
  const Clip& clip = clip_of(call);
  for (int64_t t = 0; t < Layout::groups(call); ++t) {
    const auto clipped = Layout::operand(call, 0, t), g = Layout::operand(call, 1, t);
    Layout::each(clip.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V high = broadcast<V>(T(clip.limit)), low = -high;
      V x = g.template get<V>(i);  // a NaN fails both comparisons and stays
      x = x > high ? high : x;
      clipped.put(i, x < low ? low : x);
    });
  }
}

template <class Layout>
void clip_value_adjoint(const Call& call) {
  using T = typename Layout::Type;
  const Clip& clip = clip_of(call);
  for (int64_t t = 0; t < Layout::groups(call); ++t) {
    const auto u_raw = Layout::operand(call, 0, t), u = Layout::operand(call, 1, t), g = Layout::operand(call, 2, t);
    Layout::each(clip.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V x = g.template get<V>(i), size = x < V{} ? -x : x;
      u_raw.put(i, size <= broadcast<V>(T(clip.limit)) ? u.template get<V>(i) : V{});
    });
  }
}

// A gradient and the entries that count for its norm: all, or with a mask those with mask != 0.
template <class Layout>
struct Gradient {
  typename Layout::Operand g;
  typename Layout::Shared mask;
  int64_t size;

  template <class V>
  V counted(int64_t i) const {
    const V x = g.template get<V>(i);
    if (!mask) return x;
    return mask.template get<V>(i) != V{} ? x : V{};
  }
  typename Layout::Number norm() const {
    return square_root(Layout::sum(size, [&](auto lane, int64_t i) {
      const auto x = counted<decltype(lane)>(i);
      return x * x;
    }));
  }
};

template <class Layout>
void clip_norm(const Call& call) {
  using Number = typename Layout::Number;
  const Clip& clip = clip_of(call);
  const Number limit = Layout::constant(clip.limit);
  for (int64_t t = 0; t < Layout::groups(call); ++t) {
    const auto clipped = Layout::operand(call, 0, t);
    const Gradient<Layout> g{Layout::operand(call, 1, t), Layout::shared(call, 2, t), clip.size};
    const Number n = g.norm(), scale = n > limit ? limit / n : Number{} + 1;
    Layout::each(clip.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      clipped.put(i, Layout::template everywhere<V>(scale) * g.g.template get<V>(i));
    });
  }
}

template <class Layout>
void clip_norm_adjoint(const Call& call) {
  using Number = typename Layout::Number;
  const Clip& clip = clip_of(call);
  const Number limit = Layout::constant(clip.limit);
  for (int64_t t = 0; t < Layout::groups(call); ++t) {
    const auto u_raw = Layout::operand(call, 0, t), u = Layout::operand(call, 1, t);
    const Gradient<Layout> g{Layout::operand(call, 2, t), Layout::shared(call, 3, t), clip.size};
    const Number n = g.norm();
    const auto clips = n > limit;
    const Number along = Layout::sum(
        clip.size, [&](auto lane, int64_t i) { return g.g.template get<decltype(lane)>(i) * u.template get<decltype(lane)>(i); });
    const Number scale = limit / n, part = along / n / n;
    Layout::each(clip.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V as_is = u.template get<V>(i), across = as_is - Layout::template everywhere<V>(part) * g.template counted<V>(i);
      u_raw.put(i, clips ? Layout::template everywhere<V>(scale) * across : as_is);
    });
  }
}

}  // namespace

template <class Layout>
void add_clip_ops(OpTable& table) {
  set_op(table, Op::clip_value, clip_value<Layout>);
  set_op(table, Op::clip_value_adjoint, clip_value_adjoint<Layout>);
  set_op(table, Op::clip_norm, clip_norm<Layout>);
  set_op(table, Op::clip_norm_adjoint, clip_norm_adjoint<Layout>);
}
FASTMAML_BOTH_LAYOUTS(add_clip_ops)

FASTMAML_CPU_END
