// The inner update and its adjoint, conjugate gradients, and the tree that sums over tasks. Formulas: ALGORITHMS 1.1 and 2.5.
#include <cmath>

#include "cpu/cpu.h"

FASTMAML_CPU_BEGIN
namespace {

int64_t size_of(const Call& call) { return std::get_if<Vector>(&call.layer)->size; }

template <class T>
void sgd_update(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* next = at<T>(call, 0, t);
    const T *phi = at<T>(call, 1, t), *g = at<T>(call, 2, t), *rate = at<T>(call, 3, t);
    for_lanes<T>(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(next + i, load<V>(phi + i) - load<V>(rate + i) * load<V>(g + i));
    });
  }
}

template <class T>
void scale_by_rate(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* u = at<T>(call, 0, t);
    const T *rate = at<T>(call, 1, t), *lambda = at<T>(call, 2, t);
    for_lanes<T>(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(u + i, load<V>(rate + i) * load<V>(lambda + i));
    });
  }
}

template <class T>
void rate_grad(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* da = at<T>(call, 0, t);
    const T *g = at<T>(call, 1, t), *lambda = at<T>(call, 2, t);
    for_lanes<T>(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(da + i, load<V>(da + i) - load<V>(g + i) * load<V>(lambda + i));
    });
  }
}

template <class T>
void adjoint_update(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* lambda = at<T>(call, 0, t);
    const T* hu = at<T>(call, 1, t);
    for_lanes<T>(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(lambda + i, load<V>(lambda + i) - load<V>(hu + i));
    });
  }
}

template <class T>
void proximal(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* g = at<T>(call, 0, t);
    const T lam = *at<T>(call, 1, t), *phi = at<T>(call, 2, t), *theta = at<T>(call, 3, t);
    for_lanes<T>(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(g + i, load<V>(g + i) + lam * (load<V>(phi + i) - load<V>(theta + i)));
    });
  }
}

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  return block_sum<T>(n, [&](auto lane, int64_t i) { return load<decltype(lane)>(a + i) * load<decltype(lane)>(b + i); });
}

constexpr double kConverged = 1e-10;  // on r.r; ALGORITHMS 2.5

template <class T>
void cg_start(const Call& call) {
  const int64_t n = size_of(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *s = at<T>(call, 0, t), *r = at<T>(call, 1, t), *p = at<T>(call, 2, t), *state = at<T>(call, 3, t);
    const T* v = at<T>(call, 4, t);
    std::memset(s, 0, size_t(n) * sizeof(T));
    std::memcpy(r, v, size_t(n) * sizeof(T));
    std::memcpy(p, v, size_t(n) * sizeof(T));
    state[0] = state[1] = T(dot(v, v, n));
    state[2] = state[0] != T(0) ? T(1) : T(0);  // NaN goes on, and shows in the solution
  }
}

template <class T>
void cg_step(const Call& call) {
  const int64_t n = size_of(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *s = at<T>(call, 0, t), *r = at<T>(call, 1, t), *p = at<T>(call, 2, t), *state = at<T>(call, 3, t), *hp = at<T>(call, 4, t);
    const T* settings = at<T>(call, 5, t);
    if (state[2] == T(0)) continue;
    const T over = T(1) / settings[0], diagonal = T(1) + settings[1];
    // hp becomes A p
    for_lanes<T>(n, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(hp + i, diagonal * load<V>(p + i) + load<V>(hp + i) * over);
    });
    const double curvature = dot<T>(p, hp, n), rr = double(state[0]);
    if (!(curvature > 0)) {
      state[2] = T(0);
      continue;
    }
    const T alpha = T(rr / curvature);
    for_lanes<T>(n, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(s + i, load<V>(s + i) + alpha * load<V>(p + i));
      store(r + i, load<V>(r + i) - alpha * load<V>(hp + i));
    });
    const double next = dot<T>(r, r, n);
    const T beta = T(next / rr);
    for_lanes<T>(n, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(p + i, load<V>(r + i) + beta * load<V>(p + i));
    });
    state[0] = T(next);
    if (next < kConverged) state[2] = T(0);
  }
}

template <class T>
void cg_residual(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    const T* state = at<T>(call, 1, t);
    at<T>(call, 0, t)[0] = state[1] > T(0) ? T(std::sqrt(double(state[0]) / double(state[1]))) : T(0);
  }
}

template <class T>
void tree_reduce(void* out_, void* x_, const void* w_, int64_t tasks, int64_t size, uintptr_t /* stream */) {
  T *out = static_cast<T*>(out_), *x = static_cast<T*>(x_);
  const T* w = static_cast<const T*>(w_);
  constexpr int64_t kBlock = 1024;  // every task's slice of a block stays in cache
  const T mean = w ? T(1) : T(1.0 / double(tasks));
  for (int64_t from = 0; from < size; from += kBlock) {
    const int64_t count = size - from < kBlock ? size - from : kBlock;
    if (w)
      for (int64_t t = 0; t < tasks; ++t)
        for_lanes<T>(count, [&](auto lane, int64_t i) {
          T* leaf = x + t * size + from + i;
          store(leaf, load<decltype(lane)>(leaf) * w[t]);
        });
    for (int64_t stride = 1; stride < tasks; stride *= 2)
      for (int64_t t = 0; t + stride < tasks; t += 2 * stride) {
        T* a = x + t * size + from;
        const T* b = x + (t + stride) * size + from;
        for_lanes<T>(count, [&](auto lane, int64_t i) {
          using V = decltype(lane);
          store(a + i, load<V>(a + i) + load<V>(b + i));
        });
      }
    for_lanes<T>(count, [&](auto lane, int64_t i) { store(out + from + i, load<decltype(lane)>(x + from + i) * mean); });
  }
}

}  // namespace

template <class T>
void add_update_ops(OpTable& table) {
  set_op(table, Op::sgd_update, sgd_update<T>);
  set_op(table, Op::scale_by_rate, scale_by_rate<T>);
  set_op(table, Op::rate_grad, rate_grad<T>);
  set_op(table, Op::adjoint_update, adjoint_update<T>);
  set_op(table, Op::proximal, proximal<T>);
  set_op(table, Op::cg_start, cg_start<T>);
  set_op(table, Op::cg_step, cg_step<T>);
  set_op(table, Op::cg_residual, cg_residual<T>);
  table.tree_reduce = tree_reduce<T>;
}
template void add_update_ops<float>(OpTable&);
template void add_update_ops<double>(OpTable&);

FASTMAML_CPU_END
