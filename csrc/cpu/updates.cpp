// The inner update and its adjoint, conjugate gradients, and the tree that sums over tasks. Formulas: ALGORITHMS 1.1 and 2.5.
#include <cmath>

#include "cpu/layout.h"
#include "cpu/vec_math.h"

FASTMAML_CPU_BEGIN
namespace {

int64_t size_of(const Call& call) { return std::get_if<Vector>(&call.layer)->size; }

template <class Layout>
void sgd_update(const Call& call) {
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto next = Layout::operand(call, 0, g), phi = Layout::operand(call, 1, g), grad = Layout::operand(call, 2, g);
    const auto rate = Layout::shared(call, 3, g);
    Layout::each(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      next.put(i, phi.template get<V>(i) - rate.template get<V>(i) * grad.template get<V>(i));
    });
  }
}

// `rate` is one number
template <class Layout>
void uniform_update(const Call& call) {
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto next = Layout::operand(call, 0, g), phi = Layout::operand(call, 1, g), grad = Layout::operand(call, 2, g);
    const auto rate = Layout::shared(call, 3, g).data[0];
    Layout::each(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      next.put(i, phi.template get<V>(i) - rate * grad.template get<V>(i));
    });
  }
}

template <class Layout>
void scale_by_rate(const Call& call) {
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto u = Layout::operand(call, 0, g), lambda = Layout::operand(call, 2, g);
    const auto rate = Layout::shared(call, 1, g);
    Layout::each(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      u.put(i, rate.template get<V>(i) * lambda.template get<V>(i));
    });
  }
}

template <class Layout>
void rate_grad(const Call& call) {
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto da = Layout::operand(call, 0, g), grad = Layout::operand(call, 1, g), lambda = Layout::operand(call, 2, g);
    Layout::each(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      da.put(i, da.template get<V>(i) - grad.template get<V>(i) * lambda.template get<V>(i));
    });
  }
}

template <class Layout>
void adjoint_update(const Call& call) {
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto lambda = Layout::operand(call, 0, g), hu = Layout::operand(call, 1, g);
    Layout::each(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      lambda.put(i, lambda.template get<V>(i) - hu.template get<V>(i));
    });
  }
}

// rate_grad -= g lambda;  lambda -= hu;  u = rate lambda: the same bits as the three separate ops
template <class Layout>
void sgd_adjoint(const Call& call) {
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto lambda = Layout::operand(call, 0, g), da = Layout::operand(call, 1, g), u = Layout::operand(call, 2, g);
    const auto hu = Layout::operand(call, 3, g), grad = Layout::operand(call, 4, g);
    const auto rate = Layout::shared(call, 5, g);
    const auto sweep = [&](auto with_rate_grad, auto with_u) {
      Layout::each(size_of(call), [&](auto lane, int64_t i) {
        using V = decltype(lane);
        const V before = lambda.template get<V>(i), after = before - hu.template get<V>(i);
        if constexpr (with_rate_grad) da.put(i, da.template get<V>(i) - grad.template get<V>(i) * before);
        lambda.put(i, after);
        if constexpr (with_u) u.put(i, rate.template get<V>(i) * after);
      });
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (da && u)
      sweep(yes, yes);
    else if (da)
      sweep(yes, no);
    else
      sweep(no, yes);
  }
}

template <class Layout>
void proximal(const Call& call) {
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto grad = Layout::operand(call, 0, g), phi = Layout::operand(call, 2, g), theta = Layout::operand(call, 3, g);
    const auto lam = Layout::shared(call, 1, g);
    Layout::each(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      grad.put(i, grad.template get<V>(i) + lam.data[0] * (phi.template get<V>(i) - theta.template get<V>(i)));
    });
  }
}

template <class Layout>
typename Layout::Number dot(typename Layout::Operand a, typename Layout::Operand b, int64_t n) {
  return Layout::sum(n, [&](auto lane, int64_t i) { return a.template get<decltype(lane)>(i) * b.template get<decltype(lane)>(i); });
}

// |r| / |v|, the relative error of A s = v; 0 for v = 0
template <class Number>
Number relative_residual(Number rr, Number vv) {
  const Number none{}, one = none + 1;
  const auto solved = vv == none;
  return solved ? none : square_root(rr / (solved ? one : vv));
}

// state = [r.r, v.v, active, steps taken, negative curvature]
template <class Layout>
void cg_start(const Call& call) {
  using Number = typename Layout::Number;
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto s = Layout::operand(call, 0, g), r = Layout::operand(call, 1, g), p = Layout::operand(call, 2, g);
    const auto state = Layout::operand(call, 3, g), history = Layout::operand(call, 4, g), v = Layout::operand(call, 5, g);
    Layout::each(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V x = v.template get<V>(i);
      s.put(i, lane);
      r.put(i, x);
      p.put(i, x);
    });
    const Number vv = dot<Layout>(v, v, size_of(call)), none{};
    state.put_number(0, vv);
    state.put_number(1, vv);
    state.put_number(2, vv != none ? none + 1 : none);  // NaN stays active, and shows in the solution
    state.put_number(3, none);
    state.put_number(4, none);
    history.put_number(0, relative_residual(vv, vv));
  }
}

// A task that is done keeps its vectors.
template <class Layout>
void cg_step(const Call& call) {
  using T = typename Layout::Type;
  using Number = typename Layout::Number;
  const int64_t n = size_of(call);
  for (int64_t g = 0; g < Layout::groups(call); ++g) {
    const auto s = Layout::operand(call, 0, g), r = Layout::operand(call, 1, g), p = Layout::operand(call, 2, g);
    const auto state = Layout::operand(call, 3, g), history = Layout::operand(call, 4, g), hp = Layout::operand(call, 5, g);
    const auto settings = Layout::shared(call, 6, g);
    const Number rr = state.number(0), vv = state.number(1), none{}, one = none + 1;
    history.put_number(0, relative_residual(rr, vv));
    const auto active = state.number(2) != none;
    if (!Layout::any(active)) continue;
    const T over = T(1) / settings.data[0], diagonal = T(1) + settings.data[1];
    // hp becomes A p
    Layout::each(n, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      hp.put(i, diagonal * p.template get<V>(i) + hp.template get<V>(i) * over);
    });
    const Number curvature = dot<Layout>(p, hp, n);
    const auto ends = active & (curvature <= none);  // a NaN goes on
    const auto goes = active & ((ends ? one : none) == none);
    state.put_number(2, goes ? one : none);
    state.put_number(4, ends ? one : state.number(4));
    if (!Layout::any(goes)) continue;
    const Number alpha = rr / curvature;
    Layout::each(n, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V step = Layout::template everywhere<V>(alpha), s_i = s.template get<V>(i), r_i = r.template get<V>(i);
      s.put(i, goes ? s_i + step * p.template get<V>(i) : s_i);
      r.put(i, goes ? r_i - step * hp.template get<V>(i) : r_i);
    });
    const Number next = dot<Layout>(r, r, n), beta = next / rr;
    Layout::each(n, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V p_i = p.template get<V>(i);
      p.put(i, goes ? r.template get<V>(i) + Layout::template everywhere<V>(beta) * p_i : p_i);
    });
    const Number after = goes ? next : rr;
    const auto stops = (after < Layout::constant(double(settings.data[2]))) | (after == none);
    state.put_number(0, after);
    state.put_number(2, goes ? (stops ? none : one) : none);
    state.put_number(3, state.number(3) + (goes ? one : none));
    history.put_number(0, relative_residual(after, vv));
  }
}

template <class T>
void tree_add(void* a_, const void* b_, int64_t size) {
  T* a = static_cast<T*>(a_);
  const T* b = static_cast<const T*>(b_);
  for_lanes<T>(size, [&](auto lane, int64_t i) {
    using V = decltype(lane);
    store(a + i, load<V>(a + i) + load<V>(b + i));
  });
}

template <class T>
void tree_reduce(void* out_, void* x_, const void* w_, int64_t tasks, int64_t size, int64_t stride, uintptr_t /* stream */) {
  T *out = static_cast<T*>(out_), *x = static_cast<T*>(x_);
  const T* w = static_cast<const T*>(w_);
  constexpr int64_t kBlock = 1024;  // every task's part of a block stays in cache
  const T mean = w ? T(1) : T(1.0 / double(tasks));
  for (int64_t from = 0; from < size; from += kBlock) {
    const int64_t count = size - from < kBlock ? size - from : kBlock;
    if (w)
      for (int64_t t = 0; t < tasks; ++t)
        for_lanes<T>(count, [&](auto lane, int64_t i) {
          T* leaf = x + t * stride + from + i;
          store(leaf, load<decltype(lane)>(leaf) * w[t]);
        });
    for (int64_t apart = 1; apart < tasks; apart *= 2)
      for (int64_t t = 0; t + apart < tasks; t += 2 * apart) tree_add<T>(x + t * stride + from, x + (t + apart) * stride + from, count);
    for_lanes<T>(count, [&](auto lane, int64_t i) { store(out + from + i, load<decltype(lane)>(x + from + i) * mean); });
  }
}

}  // namespace

template <class Layout>
void add_update_ops(OpTable& table) {
  set_op(table, Op::sgd_update, sgd_update<Layout>);
  set_op(table, Op::uniform_update, uniform_update<Layout>);
  set_op(table, Op::scale_by_rate, scale_by_rate<Layout>);
  set_op(table, Op::rate_grad, rate_grad<Layout>);
  set_op(table, Op::adjoint_update, adjoint_update<Layout>);
  set_op(table, Op::sgd_adjoint, sgd_adjoint<Layout>);
  set_op(table, Op::proximal, proximal<Layout>);
  set_op(table, Op::cg_start, cg_start<Layout>);
  set_op(table, Op::cg_step, cg_step<Layout>);
  table.tree_reduce = tree_reduce<typename Layout::Type>;
  table.tree_add = tree_add<typename Layout::Type>;
}
FASTMAML_BOTH_LAYOUTS(add_update_ops)

FASTMAML_CPU_END
