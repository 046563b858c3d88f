// SGD with momentum, Adam and AdamW, and their adjoints. Formulas: ALGORITHMS 1.3 and 1.4, reference/update_rule.cpp.
#include <cmath>

#include "cpu/layout.h"
#include "cpu/vec_math.h"

FASTMAML_CPU_BEGIN
namespace {

template <class Layout>
void momentum_update(const Call& call) {
  using T = typename Layout::Type;
  const Momentum& rule = *std::get_if<Momentum>(&call.layer);
  const T momentum = T(rule.momentum), share = T(1 - rule.dampening);
  for (int64_t t = 0; t < Layout::groups(call); ++t) {
    const auto next = Layout::operand(call, 0, t), b_next = Layout::operand(call, 1, t), direction = Layout::operand(call, 2, t);
    const auto phi = Layout::operand(call, 3, t), g = Layout::operand(call, 4, t), b = Layout::operand(call, 6, t);
    const auto rate = Layout::shared(call, 5, t);
    Layout::each(rule.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V now = g.template get<V>(i);
      V average = now;
      if (!rule.first) average = momentum * b.template get<V>(i) + share * now;
      V d = average;
      if (rule.nesterov) d = now + momentum * average;
      next.put(i, phi.template get<V>(i) - rate.template get<V>(i) * d);
      b_next.put(i, average);
      if (direction) direction.put(i, d);
    });
  }
}

template <class Layout>
void momentum_adjoint(const Call& call) {
  using T = typename Layout::Type;
  const Momentum& rule = *std::get_if<Momentum>(&call.layer);
  const T momentum = T(rule.momentum), share = T(rule.first ? 1 : 1 - rule.dampening);
  const T of_p = rule.nesterov ? momentum : T(1), of_u = rule.nesterov ? T(1) : T(0);
  for (int64_t t = 0; t < Layout::groups(call); ++t) {
    const auto u = Layout::operand(call, 0, t), p = Layout::operand(call, 1, t);
    const auto lambda = Layout::operand(call, 3, t);
    const auto rate = Layout::shared(call, 2, t);
    Layout::each(rule.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V v = rate.template get<V>(i) * lambda.template get<V>(i), sum = p.template get<V>(i) + of_p * v;
      u.put(i, share * sum + of_u * v);
      p.put(i, momentum * sum);
    });
  }
}

struct Corrections {
  double c1, c2;
  Corrections(const Adam& rule, double steps_before)
      : c1(1 - std::pow(rule.beta1, double(rule.step + 1) + steps_before)),
        c2(1 - std::pow(rule.beta2, double(rule.step + 1) + steps_before)) {}
};

template <class Layout>
void adam_update(const Call& call) {
  using T = typename Layout::Type;
  const Adam& rule = *std::get_if<Adam>(&call.layer);
  const T beta1 = T(rule.beta1), beta2 = T(rule.beta2), new1 = T(1 - rule.beta1), new2 = T(1 - rule.beta2);
  const T eps = T(rule.eps), decay = T(rule.decay);
  for (int64_t t = 0; t < Layout::groups(call); ++t) {
    const auto next = Layout::operand(call, 0, t), m_next = Layout::operand(call, 1, t), s_next = Layout::operand(call, 2, t);
    const auto phi = Layout::operand(call, 3, t), g = Layout::operand(call, 4, t);
    const auto rate = Layout::shared(call, 5, t);
    const auto m = Layout::operand(call, 6, t), s = Layout::operand(call, 7, t);
    const auto step_count = Layout::shared(call, 8, t);
    const Corrections c(rule, step_count ? double(step_count.data[0]) : 0.0);
    const T over1 = T(1 / c.c1), over2 = T(1 / c.c2);
    Layout::each(rule.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V now = g.template get<V>(i), at = phi.template get<V>(i);
      const V first = beta1 * (m ? m.template get<V>(i) : V{}) + new1 * now,
              second = beta2 * (s ? s.template get<V>(i) : V{}) + new2 * now * now;
      const V D = square_root<V>(second * over2) + eps;
      next.put(i, at - rate.template get<V>(i) * (first * over1 / D + decay * at));
      m_next.put(i, first);
      s_next.put(i, second);
    });
  }
}

template <class Layout>
void adam_adjoint(const Call& call) {
  using T = typename Layout::Type;
  const Adam& rule = *std::get_if<Adam>(&call.layer);
  const Corrections c(rule, 0.0);
  const T beta1 = T(rule.beta1), beta2 = T(rule.beta2), new1 = T(1 - rule.beta1), new2 = T(2 * (1 - rule.beta2));
  const T over1 = T(1 / c.c1), over2 = T(1 / c.c2), half2 = T(0.5 / c.c2), eps = T(rule.eps), decay = T(rule.decay);
  for (int64_t t = 0; t < Layout::groups(call); ++t) {
    const auto u = Layout::operand(call, 0, t), lambda = Layout::operand(call, 1, t), p = Layout::operand(call, 2, t),
               r = Layout::operand(call, 3, t), da = Layout::operand(call, 4, t);
    const auto phi = Layout::operand(call, 5, t), g = Layout::operand(call, 6, t);
    const auto rate = Layout::shared(call, 7, t);
    const auto m = Layout::operand(call, 8, t), s = Layout::operand(call, 9, t);
    Layout::each(rule.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      const V adjoint = lambda.template get<V>(i), v = rate.template get<V>(i) * adjoint, mh = m.template get<V>(i) * over1;
      const V root = square_root<V>(s.template get<V>(i) * over2), over = T(1) / (root + eps), step = mh * over;
      if (da) da.put(i, da.template get<V>(i) - (step + decay * (phi ? phi.template get<V>(i) : V{})) * adjoint);
      const V of_m = p.template get<V>(i) + v * over1 * over;
      // One division after the other, because root^2 and D^2 leave float32's range. If root is 0, no gradient passes.
      const V of_s = r.template get<V>(i) - (root != V{} ? v * (mh / root) * over * over * half2 : V{});
      u.put(i, new1 * of_m + new2 * g.template get<V>(i) * of_s);
      lambda.put(i, adjoint - decay * v);
      p.put(i, beta1 * of_m);
      r.put(i, beta2 * of_s);
    });
  }
}

}  // namespace

template <class Layout>
void add_update_rule_ops(OpTable& table) {
  set_op(table, Op::momentum_update, momentum_update<Layout>);
  set_op(table, Op::momentum_adjoint, momentum_adjoint<Layout>);
  set_op(table, Op::adam_update, adam_update<Layout>);
  set_op(table, Op::adam_adjoint, adam_adjoint<Layout>);
}
FASTMAML_BOTH_LAYOUTS(add_update_rule_ops)

FASTMAML_CPU_END
