// SGD with momentum, Adam and AdamW, and their adjoints. Formulas: ALGORITHMS 1.3 and 1.4, reference/update_rule.cpp.
#include <cmath>

#include "cpu/cpu.h"

FASTMAML_CPU_BEGIN
namespace {

template <class T>
void momentum_update(const Call& call) {
  const Momentum& rule = *std::get_if<Momentum>(&call.layer);
  const T momentum = T(rule.momentum), share = T(1 - rule.dampening);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *next = at<T>(call, 0, t), *b_next = at<T>(call, 1, t), *direction = at<T>(call, 2, t);
    const T *phi = at<T>(call, 3, t), *g = at<T>(call, 4, t), *rate = at<T>(call, 5, t), *b = at<T>(call, 6, t);
    for_lanes<T>(rule.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V now = load<V>(g + i);
      V average = now;
      if (!rule.first) average = momentum * load<V>(b + i) + share * now;
      V d = average;
      if (rule.nesterov) d = now + momentum * average;
      store(next + i, load<V>(phi + i) - load<V>(rate + i) * d);
      store(b_next + i, average);
      if (direction) store(direction + i, d);
    });
  }
}

template <class T>
void momentum_adjoint(const Call& call) {
  const Momentum& rule = *std::get_if<Momentum>(&call.layer);
  const T momentum = T(rule.momentum), share = T(rule.first ? 1 : 1 - rule.dampening);
  const T of_p = rule.nesterov ? momentum : T(1), of_u = rule.nesterov ? T(1) : T(0);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *u = at<T>(call, 0, t), *p = at<T>(call, 1, t);
    const T *rate = at<T>(call, 2, t), *lambda = at<T>(call, 3, t);
    for_lanes<T>(rule.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V v = load<V>(rate + i) * load<V>(lambda + i), sum = load<V>(p + i) + of_p * v;
      store(u + i, share * sum + of_u * v);
      store(p + i, momentum * sum);
    });
  }
}

struct Corrections {
  double c1, c2;
  Corrections(const Adam& rule, double steps_before)
      : c1(1 - std::pow(rule.beta1, double(rule.step + 1) + steps_before)),
        c2(1 - std::pow(rule.beta2, double(rule.step + 1) + steps_before)) {}
};

template <class T>
void adam_update(const Call& call) {
  const Adam& rule = *std::get_if<Adam>(&call.layer);
  const T beta1 = T(rule.beta1), beta2 = T(rule.beta2), new1 = T(1 - rule.beta1), new2 = T(1 - rule.beta2);
  const T eps = T(rule.eps), decay = T(rule.decay);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *next = at<T>(call, 0, t), *m_next = at<T>(call, 1, t), *s_next = at<T>(call, 2, t);
    const T *phi = at<T>(call, 3, t), *g = at<T>(call, 4, t), *rate = at<T>(call, 5, t);
    const T *m = at<T>(call, 6, t), *s = at<T>(call, 7, t), *step_count = at<T>(call, 8, t);
    const Corrections c(rule, step_count ? double(*step_count) : 0.0);
    const T over1 = T(1 / c.c1), over2 = T(1 / c.c2);
    for_lanes<T>(rule.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V now = load<V>(g + i), at = load<V>(phi + i);
      const V first = beta1 * load_or<V>(m, i, T(0)) + new1 * now, second = beta2 * load_or<V>(s, i, T(0)) + new2 * now * now;
      const V D = square_root<V>(second * over2) + eps;
      store(next + i, at - load<V>(rate + i) * (first * over1 / D + decay * at));
      store(m_next + i, first);
      store(s_next + i, second);
    });
  }
}

template <class T>
void adam_adjoint(const Call& call) {
  const Adam& rule = *std::get_if<Adam>(&call.layer);
  const Corrections c(rule, 0.0);
  const T beta1 = T(rule.beta1), beta2 = T(rule.beta2), new1 = T(1 - rule.beta1), new2 = T(2 * (1 - rule.beta2));
  const T over1 = T(1 / c.c1), over2 = T(1 / c.c2), half2 = T(0.5 / c.c2), eps = T(rule.eps), decay = T(rule.decay);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *u = at<T>(call, 0, t), *lambda = at<T>(call, 1, t), *p = at<T>(call, 2, t), *r = at<T>(call, 3, t), *da = at<T>(call, 4, t);
    const T *phi = at<T>(call, 5, t), *g = at<T>(call, 6, t), *rate = at<T>(call, 7, t);
    const T *m = at<T>(call, 8, t), *s = at<T>(call, 9, t);
    for_lanes<T>(rule.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V adjoint = load<V>(lambda + i), v = load<V>(rate + i) * adjoint, mh = load<V>(m + i) * over1;
      const V root = square_root<V>(load<V>(s + i) * over2), over = T(1) / (root + eps), step = mh * over;
      if (da) store(da + i, load<V>(da + i) - (step + decay * load_or<V>(phi, i, T(0))) * adjoint);
      const V of_m = load<V>(p + i) + v * over1 * over;
      // Divided in turn, for root^2 and D^2 leave float32's range; where root is 0 there is no gradient to pass on.
      const V of_s = load<V>(r + i) - (root != V{} ? v * (mh / root) * over * over * half2 : V{});
      store(u + i, new1 * of_m + new2 * load<V>(g + i) * of_s);
      store(lambda + i, adjoint - decay * v);
      store(p + i, beta1 * of_m);
      store(r + i, beta2 * of_s);
    });
  }
}

}  // namespace

template <class T>
void add_update_rule_ops(OpTable& table) {
  set_op(table, Op::momentum_update, momentum_update<T>);
  set_op(table, Op::momentum_adjoint, momentum_adjoint<T>);
  set_op(table, Op::adam_update, adam_update<T>);
  set_op(table, Op::adam_adjoint, adam_adjoint<T>);
}
template void add_update_rule_ops<float>(OpTable&);
template void add_update_rule_ops<double>(OpTable&);

FASTMAML_CPU_END
