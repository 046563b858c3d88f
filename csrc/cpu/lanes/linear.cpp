// linear in lanes: y = x w + b, its gradients and their tangents. Each is one pass over its output, without packing or transposing.
#include "cpu/lanes/products.h"

FASTMAML_CPU_BEGIN
namespace {

template <class T>
struct Group {
  const Call& call;
  const int64_t g;
  const Linear& s = *std::get_if<Linear>(&call.layer);
  const int64_t N = call.step.examples;

  T* operand(int i) const { return in_lanes<T>(call, i, g); }

  // y = b + x w, or with two terms its tangent. sign: for a tangent, the value whose sign masks it.
  void forward(T* y, const T* b, LaneTerm<T> first, LaneTerm<T> second, const T* sign) const {
    LaneRectifier<T> rectify(s.y);
    lane_product(LaneProduct<T>{y, N, s.out, s.in, false, b, rectify, sign, {first, second}, second.a ? 2 : 1});
  }
  void tangent(T* y_dot, const T* x, const T* x_dot, const T* w, const T* w_dot, const T* b_dot, const T* y) const {
    if (x_dot)
      forward(y_dot, b_dot, {x_dot, w}, {x, w_dot}, y);
    else
      forward(y_dot, b_dot, {x, w_dot}, {}, y);
  }

  // dx = dy w^T, or with two terms its tangent. x: the rectifier's output, or null.
  void backward(T* dx, LaneTerm<T> first, LaneTerm<T> second, const T* x) const {
    LaneRectifier<T> rectify(s.x);
    rectify.on = x != nullptr;
    lane_product(LaneProduct<T>{dx, N, s.in, s.out, true, nullptr, rectify, x, {first, second}, second.a ? 2 : 1});
  }

  void weight_gradient(T* dw, T* db, LaneTerm<T> first, LaneTerm<T> second, const T* dy) const {
    lane_outer(LaneOuter<T>{dw, N, s.in, s.out, {first, second}, second.a ? 2 : 1});
    if (!db) return;
    using V = Vec<T>;
    constexpr int64_t L = kLanes<T>;
    in_parts<kLaneCols>(0, s.out, [&](auto cols, int64_t o0) {
      LaneSum<V> total[cols];
      for (int64_t from = 0; from < N; from += kLaneBlockRows) {
        const int64_t to = from + kLaneBlockRows < N ? from + kLaneBlockRows : N;
        V sum[cols] = {};
        for (int64_t n = from; n < to; ++n)
          for (int o = 0; o < cols; ++o) sum[o] += load<V>(dy + (n * s.out + o0 + o) * L);
        for (int o = 0; o < cols; ++o) total[o].add(sum[o]);
      }
      for (int o = 0; o < cols; ++o) store(db + (o0 + o) * L, total[o].value());
    });
  }
};

template <class T, class Body>
void each_group(const Call& call, const Body& body) {
  for (int64_t g = 0; g < LaneMajor<T>::groups(call); ++g) body(Group<T>{call, g});
}

template <class T>
void linear_fwd(const Call& call) {
  each_group<T>(call, [](const Group<T>& g) { g.forward(g.operand(0), g.operand(3), {g.operand(1), g.operand(2)}, {}, nullptr); });
}

template <class T>
void linear_fwd_jvp(const Call& call) {
  each_group<T>(call, [](const Group<T>& g) {
    g.tangent(g.operand(0), g.operand(1), g.operand(2), g.operand(3), g.operand(4), g.operand(5), g.operand(6));
  });
}

template <class T>
void linear_fwd_dual(const Call& call) {
  each_group<T>(call, [](const Group<T>& g) {
    const T *x = g.operand(2), *x_dot = g.operand(3), *w = g.operand(4);
    g.forward(g.operand(0), g.operand(6), {x, w}, {}, nullptr);
    g.tangent(g.operand(1), x, x_dot, w, g.operand(5), g.operand(7), g.operand(0));
  });
}

template <class T>
void linear_bwd_data(const Call& call) {
  each_group<T>(call, [](const Group<T>& g) { g.backward(g.operand(0), {g.operand(1), g.operand(2)}, {}, g.operand(3)); });
}

template <class T>
void linear_bwd_data_jvp(const Call& call) {
  each_group<T>(
      call, [](const Group<T>& g) { g.backward(g.operand(0), {g.operand(2), g.operand(3)}, {g.operand(1), g.operand(4)}, g.operand(5)); });
}

template <class T>
void linear_bwd_data_dual(const Call& call) {
  each_group<T>(call, [](const Group<T>& g) {
    const T *dy = g.operand(2), *dy_dot = g.operand(3), *w = g.operand(4), *w_dot = g.operand(5), *x = g.operand(6);
    g.backward(g.operand(0), {dy, w}, {}, x);
    g.backward(g.operand(1), {dy_dot, w}, {dy, w_dot}, x);
  });
}

template <class T>
void linear_bwd_weight(const Call& call) {
  each_group<T>(call, [](const Group<T>& g) {
    const T* dy = g.operand(3);
    g.weight_gradient(g.operand(0), g.operand(1), {g.operand(2), dy}, {}, dy);
  });
}

template <class T>
void linear_bwd_weight_jvp(const Call& call) {
  each_group<T>(call, [](const Group<T>& g) {
    const T *x = g.operand(2), *x_dot = g.operand(3), *dy = g.operand(4), *dy_dot = g.operand(5);
    g.weight_gradient(g.operand(0), g.operand(1), {x, dy_dot}, x_dot ? LaneTerm<T>{x_dot, dy} : LaneTerm<T>{}, dy_dot);
  });
}

}  // namespace

template <class T>
void add_lane_linear_ops(OpTable& table) {
  set_op(table, Op::linear_fwd, linear_fwd<T>);
  set_op(table, Op::linear_fwd_jvp, linear_fwd_jvp<T>);
  set_op(table, Op::linear_fwd_dual, linear_fwd_dual<T>);
  set_op(table, Op::linear_bwd_data, linear_bwd_data<T>);
  set_op(table, Op::linear_bwd_data_jvp, linear_bwd_data_jvp<T>);
  set_op(table, Op::linear_bwd_data_dual, linear_bwd_data_dual<T>);
  set_op(table, Op::linear_bwd_weight, linear_bwd_weight<T>);
  set_op(table, Op::linear_bwd_weight_jvp, linear_bwd_weight_jvp<T>);
}
template void add_lane_linear_ops<float>(OpTable&);
template void add_lane_linear_ops<double>(OpTable&);

FASTMAML_CPU_END
