// Schedules made of Hessian-vector products (gradient.cpp): the product alone and conjugate gradients.
// Also the four bare passes of the network.
#include "meta/meta.h"

namespace fastmaml {

Schedule hvp_schedule(const Program& net, int64_t examples, bool weights) {
  Schedule out;
  const Operand params = out.external(Arg::params, net.param_count), u = out.external(Arg::params_dot, net.param_count);
  hvp(out, net, params, u, support_batch(out, net, examples, weights), nullptr, out.external(Arg::grad_dot, net.param_count), {});
  return out;
}

// The gradient pass does not depend on the direction, so it runs once. Every step adds only the tangents.
Schedule conjugate_gradient_schedule(const Program& net, int64_t examples, bool weights, bool masked, int steps) {
  Schedule out;
  const int64_t P = net.param_count;
  const Vector flat{P};
  const Operand params = out.external(Arg::params, P), v = out.external(Arg::params_dot, P), settings = out.external(Arg::cg_settings, 3);
  const Operand mask = masked ? out.external(Arg::mask, P) : Operand{};
  const Operand s = out.external(Arg::solution, P), r = out.arena(P), p = out.arena(P);
  const Operand state = out.external(Arg::cg_state, 5), history = out.external(Arg::cg_history, 1 + steps);
  const auto masked_copy = [&](Operand of) {
    const Operand copy = out.arena(P);
    out.step(Op::scale_by_rate, flat, 1, {copy, mask, of});
    return copy;
  };
  const Batch support = support_batch(out, net, examples, weights);
  const Tape tape = gradient(out, net, params, support, out.arena(1), out.arena(P));
  out.step(Op::cg_start, flat, 1, {s, r, p, state, history, v});
  for (int i = 0; i < steps; ++i) {
    Operand hp = out.arena(P);
    hvp(out, net, params, masked ? masked_copy(p) : p, support, &tape, hp, {});
    if (masked) hp = masked_copy(hp);
    out.step(Op::cg_step, flat, 1, {s, r, p, state, {history.slot, 1 + i}, hp, settings});
  }
  return out;
}

Schedule passes_schedule(const Program& net, int64_t examples, bool dual) {
  Schedule out;
  const int64_t P = net.param_count, in = examples * net.input_shape().size(), rows = examples * net.output_shape().size();
  Tape tape;
  tape.examples = tape.stat_examples = examples;
  tape.params = out.external(Arg::params, P);
  tape.params_dot = out.external(Arg::params_dot, P);
  const Operand x = out.external(Arg::support_x, in), x_dot = out.external(Arg::support_x_dot, in);
  const Operand buffers = net.buffer_count ? out.external(Arg::buffers, net.buffer_count) : Operand{};
  const Operand dy = out.external(Arg::output_grad, rows), dy_dot = out.external(Arg::output_grad_dot, rows);
  const Operand grad = out.external(Arg::grad, P), grad_dot = out.external(Arg::grad_dot, P);
  if (dual) {
    forward(out, net, tape, Pass::dual, x, x_dot, buffers);
    backward(out, net, tape, Pass::dual, dy, dy_dot, grad, grad_dot, true);
  } else {
    forward(out, net, tape, Pass::primal, x, {}, buffers);
    backward(out, net, tape, Pass::primal, dy, {}, grad, {}, true);
    forward(out, net, tape, Pass::tangent, x, x_dot, buffers);
    backward(out, net, tape, Pass::tangent, {}, dy_dot, {}, grad_dot, true);
  }
  const auto deliver = [&](Arg arg, Operand from, int64_t size) { out.step(Op::copy, Vector{size}, 1, {out.external(arg, size), from}); };
  deliver(Arg::output, tape.value[net.output], rows);
  deliver(Arg::output_dot, tape.dot[net.output], rows);
  deliver(Arg::input_grad, tape.d[0], in);
  deliver(Arg::input_grad_dot, tape.d_dot[0], in);
  return out;
}

}  // namespace fastmaml
