// Flat vectors: fill_zero, add, axpy; and flatten, which only reorders.
#include "cpu/layout.h"

FASTMAML_CPU_BEGIN
namespace {

int64_t size_of(const Call& call) { return std::get_if<Vector>(&call.layer)->size; }

template <class Layout>
void fill_zero(const Call& call) {
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto out = Layout::operand(call, 0, g);
    Layout::each(size_of(call), [&](auto lane, int64_t i) { out.put(i, lane); });
  }
}

template <class Layout>
void add(const Call& call) {
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto out = Layout::operand(call, 0, g), a = Layout::operand(call, 1, g), b = Layout::operand(call, 2, g);
    Layout::each(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      out.put(i, a.template get<V>(i) + b.template get<V>(i));
    });
  }
}

template <class Layout>
void axpy(const Call& call) {
  using T = typename Layout::Type;
  const Axpy& shape = *std::get_if<Axpy>(&call.layer);
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto y = Layout::operand(call, 0, g), x = Layout::operand(call, 2, g);
    const auto alpha = Layout::shared(call, 1, g);
    const T factor = T(shape.factor) * (alpha ? alpha.data[0] : T(1));
    Layout::each(shape.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      y.put(i, y.template get<V>(i) + factor * x.template get<V>(i));
    });
  }
}

// [N, H W, C] <-> [N, C, H W]
template <class Layout, bool kForward>
void flatten(const Call& call) {
  const Flatten& s = *std::get_if<Flatten>(&call.layer);
  const int64_t pixels = s.H * s.W, C = s.C;
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto out = Layout::operand(call, 0, g), in = Layout::operand(call, 1, g);
    for (int64_t n = 0; n < call.step.examples; ++n)
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < C; ++c) {
          const int64_t image = (n * pixels + p) * C + c, vector = (n * C + c) * pixels + p;
          if constexpr (kForward)
            out.put_number(vector, in.number(image));
          else
            out.put_number(image, in.number(vector));
        }
  }
}

}  // namespace

template <class Layout>
void add_vector_ops(OpTable& table) {
  set_op(table, Op::fill_zero, fill_zero<Layout>);
  set_op(table, Op::add, add<Layout>);
  set_op(table, Op::axpy, axpy<Layout>);
  set_op(table, Op::flatten_fwd, flatten<Layout, true>);
  set_op(table, Op::flatten_bwd, flatten<Layout, false>);
}
FASTMAML_BOTH_LAYOUTS(add_vector_ops)

FASTMAML_CPU_END
