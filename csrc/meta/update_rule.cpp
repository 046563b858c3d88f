#include "meta/update_rule.h"

#include <stdexcept>

namespace fastmaml {

namespace {

bool counts_steps(InnerLoop::Rule rule) {
  switch (rule) {
    case InnerLoop::Rule::sgd:
      return false;
    case InnerLoop::Rule::adam:
      return true;
  }
  throw std::logic_error("not an update rule");
}

}  // namespace

// First-order sweeps and `stash` keep the gradients. Clipping needs the raw one again, so it is kept and the rest is done again.
UpdateRule::UpdateRule(Schedule& out, const Program& net, const InnerLoopSpec& spec, Operand theta)
    : out_(out),
      loop_(spec.loop),
      size_(net.param_count),
      rates_per_step_(spec.rates_per_step),
      uniform_(spec.uniform_rate),
      has_state_(spec.state),
      stash_(spec.stash),
      theta_(theta),
      again_(spec.loop.rate_grad && spec.loop.states() == 0 && !spec.loop.clips() && spec.loop.order > 0 && !spec.stash) {
  if (spec.state && loop_.states() > 0) {
    first_ = out.external(Arg::state, loop_.states() * size_);
    if (loop_.states() > 1) second_ = offset(first_, size_);
  }
  if (loop_.steps == 0) return;
  const int64_t rates = (rates_per_step_ ? loop_.steps : 1) * (uniform_ ? 1 : size_);
  rates_ = out.external(Arg::rates, rates);
  if (loop_.rate_grad) rate_grad_ = out.external(Arg::rate_grad, rates);
  if (loop_.proximal) lam_ = out.external(Arg::lam, 1);
  if (loop_.clip_norm > 0 && spec.mask) mask_ = out.external(Arg::mask, size_);
  if (spec.step_count && counts_steps(loop_.rule)) step_count_ = out.external(Arg::step_count, 1);
}

bool UpdateRule::own_rate_grad() const {
  switch (loop_.rule) {
    case InnerLoop::Rule::sgd:
      return false;
    case InnerLoop::Rule::adam:
      return true;
  }
  throw std::logic_error("not an update rule");
}

Operand UpdateRule::of_step(Operand rates, int k) const { return offset(rates, rates_per_step_ ? k * (uniform_ ? 1 : size_) : 0); }

Layer UpdateRule::clip() const { return Clip{size_, loop_.clip_norm > 0 ? loop_.clip_norm : loop_.clip_value}; }

Layer UpdateRule::momentum(int k) const { return Momentum{size_, loop_.momentum, loop_.dampening, loop_.nesterov, k == 0 && !has_state_}; }

Layer UpdateRule::adam(int k) const {
  return Adam{size_, loop_.beta1, loop_.beta2, loop_.eps, loop_.decoupled ? loop_.weight_decay : 0.0, k};
}

// What the rule sees of a gradient. Where nothing is against it, it takes the place of the raw one.
Operand UpdateRule::entering(Operand g, Operand phi) {
  if (loop_.clips()) {
    const Operand clipped = out_.arena(size_);
    if (loop_.clip_norm > 0)
      out_.step(Op::clip_norm, clip(), 1, {clipped, g, mask_});
    else
      out_.step(Op::clip_value, clip(), 1, {clipped, g});
    g = clipped;
  } else if (stash_ && (coupled_decay() || loop_.proximal)) {  // a kept tape still reads the batch norms' gradients in it
    const Operand own = out_.arena(size_);
    out_.step(Op::copy, Vector{size_}, 1, {own, g});
    g = own;
  }
  if (coupled_decay()) out_.step(Op::axpy, Axpy{size_, loop_.weight_decay}, 1, {g, {}, phi});
  if (loop_.proximal) out_.step(Op::proximal, Vector{size_}, 1, {g, lam_, phi, theta_});
  return g;
}

// The same in the sweep: still there, or made again from the raw gradient.
Operand UpdateRule::entered(const Trace& trace) {
  const bool kept = loop_.order == 0 || !(loop_.clips() || again_);
  return kept ? trace.g : entering(trace.raw, trace.phi);
}

void UpdateRule::step(int k, Operand phi, Operand g, Operand phi_next) {
  Trace& trace = traces_.emplace_back();
  trace.phi = phi;
  trace.raw = g;
  trace.g = entering(g, phi);
  const Operand rate = of_step(rates_, k);
  switch (loop_.rule) {
    case InnerLoop::Rule::sgd: {
      if (loop_.momentum == 0) {
        out_.step(uniform_ ? Op::uniform_update : Op::sgd_update, Vector{size_}, 1, {phi_next, phi, trace.g, rate});
        return;
      }
      const Operand b = out_.arena(size_), d = loop_.nesterov && loop_.rate_grad ? out_.arena(size_) : Operand{};
      out_.step(Op::momentum_update, momentum(k), 1, {phi_next, b, d, phi, trace.g, rate, first_});
      trace.direction = d ? d : b;
      first_ = b;
      return;
    }
    case InnerLoop::Rule::adam:
      trace.m = out_.arena(size_);
      trace.s = out_.arena(size_);
      out_.step(Op::adam_update, adam(k), 1, {phi_next, trace.m, trace.s, phi, trace.g, rate, first_, second_, step_count_});
      first_ = trace.m;
      second_ = trace.s;
      return;
  }
  throw std::logic_error("not an update rule");
}

void UpdateRule::deliver_state() {
  if (loop_.states() == 0) return;
  const Operand state = out_.external(Arg::state_next, loop_.states() * size_);
  const auto deliver = [&](Operand to, Operand from) {
    if (from)
      out_.step(Op::copy, Vector{size_}, 1, {to, from});
    else
      out_.step(Op::fill_zero, Vector{size_}, 1, {to});
  };
  deliver(state, first_);
  if (loop_.states() > 1) deliver(offset(state, size_), second_);
}

// ---------------------------------------------------------------- the sweep

void UpdateRule::start_sweep() {
  const auto zeros = [&](int64_t size, Operand vector) {
    out_.step(Op::fill_zero, Vector{size}, 1, {vector});
    return vector;
  };
  if (rate_grad_) zeros(rates_per_step_ ? loop_.steps * size_ : size_, rate_grad_);
  if (loop_.steps == 0) return;
  if (loop_.states() > 0) p_ = zeros(size_, out_.arena(size_));
  if (loop_.states() > 1) r_ = zeros(size_, out_.arena(size_));
  if (loop_.proximal) anchor_ = zeros(size_, out_.arena(size_));
}

// Of the rule alone, from lambda back to the gradient that entered it.
Operand UpdateRule::adjoint(int k, Operand lambda) {
  Trace& trace = traces_[k];
  const Operand rate = of_step(rates_, k);
  switch (loop_.rule) {
    case InnerLoop::Rule::sgd: {
      const Operand u = trace.u = out_.arena(size_);
      if (loop_.momentum != 0)
        out_.step(Op::momentum_adjoint, momentum(k), 1, {u, p_, rate, lambda});
      else
        out_.step(Op::scale_by_rate, Vector{size_}, 1, {u, rate, lambda});
      return u;
    }
    case InnerLoop::Rule::adam: {
      const Operand g = entered(trace), u = trace.u = out_.arena(size_);
      const Operand decayed = loop_.decoupled && loop_.weight_decay > 0 ? trace.phi : Operand{};
      out_.step(Op::adam_adjoint, adam(k), 1, {u, lambda, p_, r_, of_step(rate_grad_, k), decayed, g, rate, trace.m, trace.s});
      return u;
    }
  }
  throw std::logic_error("not an update rule");
}

Operand UpdateRule::before_hessian(int k, Operand lambda) {
  Trace& trace = traces_[k];
  const bool asked = loop_.has_hessian(k) || loop_.weight_decay > 0 || loop_.proximal || (own_rate_grad() && loop_.rate_grad);
  if (!asked) return {};
  if (uniform_) return lambda;
  if (again_) trace.raw = out_.arena(size_);
  const Operand u = adjoint(k, lambda);
  if (!loop_.has_hessian(k)) return {};
  if (!loop_.clips()) return u;
  const Operand u_raw = out_.arena(size_);
  if (loop_.clip_norm > 0)
    out_.step(Op::clip_norm_adjoint, clip(), 1, {u_raw, u, trace.raw, mask_});
  else
    out_.step(Op::clip_value_adjoint, clip(), 1, {u_raw, u, trace.raw});
  return u_raw;
}

Operand UpdateRule::gradient_again(int k) const { return again_ ? traces_[k].raw : Operand{}; }

void UpdateRule::after_hessian(int k, Operand lambda, Operand hu) {
  if (uniform_) {
    if (hu) out_.step(Op::axpy, Axpy{size_, -1}, 1, {lambda, of_step(rates_, k), hu});
    return;
  }
  const Trace& trace = traces_[k];
  if (rate_grad_ && !own_rate_grad()) {
    const Operand d = trace.direction ? trace.direction : entered(trace);
    out_.step(Op::rate_grad, Vector{size_}, 1, {of_step(rate_grad_, k), d, lambda});
  }
  if (hu) out_.step(Op::adjoint_update, Vector{size_}, 1, {lambda, hu});
  if (coupled_decay()) out_.step(Op::axpy, Axpy{size_, -loop_.weight_decay}, 1, {lambda, {}, trace.u});
  if (loop_.proximal) {
    out_.step(Op::axpy, Axpy{size_, -1}, 1, {lambda, lam_, trace.u});
    out_.step(Op::axpy, Axpy{size_, 1}, 1, {anchor_, lam_, trace.u});
  }
}

void UpdateRule::finish_sweep(Operand lambda) {
  if (anchor_) out_.step(Op::add, Vector{size_}, 1, {lambda, lambda, anchor_});
}

}  // namespace fastmaml
