// adapt: K inner steps on the support set.
#include <stdexcept>

#include "meta/meta.h"

namespace fastmaml {
namespace {

Op loss_op(const Loss& loss, bool tangent) {
  switch (loss.kind) {
    case Loss::Kind::cross_entropy:
      return tangent ? Op::cross_entropy_jvp : Op::cross_entropy;
    case Loss::Kind::mse:
      return tangent ? Op::mse_jvp : Op::mse;
    case Loss::Kind::none:
      break;
  }
  throw std::invalid_argument("the program has no loss, so it has no gradient");
}

Operand buffers(Schedule& out, const Program& net) { return net.buffer_count ? out.external(Arg::buffers, net.buffer_count) : Operand{}; }

// The loss sees the last rows of the batch; the gradient by the others is zero.
void loss_step(Schedule& out, const Program& net, const Batch& batch, Pass pass, Tape& tape, Operand loss, Operand dz) {
  const int64_t skipped = batch.loss_from * net.output_shape().size(), rows = batch.examples - batch.loss_from;
  const Operand z = offset(tape.value[net.output], skipped);
  if (skipped) out.step(Op::fill_zero, Vector{skipped}, 1, {dz});
  dz = offset(dz, skipped);
  if (pass == Pass::tangent) {
    const Operand z_dot = offset(tape.dot[net.output], skipped);
    out.step(loss_op(net.loss, true), net.loss, rows, {dz, z, z_dot, batch.y, batch.weights});
  } else {
    out.step(loss_op(net.loss, false), net.loss, rows, {loss, dz, z, batch.y, batch.weights});
  }
}

}  // namespace

Batch support_batch(Schedule& out, const Program& net, int64_t examples, bool weights) {
  Batch batch;
  batch.examples = batch.stat_examples = examples;
  batch.x = out.external(Arg::support_x, examples * net.input_shape().size());
  if (net.loss.kind == Loss::Kind::cross_entropy)
    batch.y = out.external(Arg::support_y, examples, Type::label);
  else
    batch.y = out.external(Arg::support_y, examples * net.output_shape().size());
  if (weights) batch.weights = out.external(Arg::support_weights, examples);
  return batch;
}

Tape gradient(Schedule& out, const Program& net, Operand params, const Batch& batch, Operand loss, Operand grad) {
  Tape tape;
  tape.examples = batch.examples;
  tape.stat_examples = batch.stat_examples;
  tape.params = params;
  forward(out, net, tape, Pass::primal, batch.x, {}, buffers(out, net));
  const Operand dz = out.arena(batch.examples * net.output_shape().size());
  loss_step(out, net, batch, Pass::primal, tape, loss, dz);
  backward(out, net, tape, Pass::primal, dz, {}, grad, {});
  return tape;
}

void hvp(Schedule& out, const Program& net, Operand params, Operand u, const Batch& batch, const Tape* stashed, Operand hu, Operand grad) {
  const Pass pass = stashed ? Pass::tangent : Pass::dual;
  Tape tape;
  if (stashed) tape = *stashed;
  tape.examples = batch.examples;
  tape.stat_examples = batch.stat_examples;
  tape.params = params;
  tape.params_dot = u;
  forward(out, net, tape, pass, batch.x, {}, buffers(out, net));
  const int64_t outputs = batch.examples * net.output_shape().size();
  Operand dz;
  if (!stashed) {
    dz = out.arena(outputs);
    loss_step(out, net, batch, Pass::primal, tape, out.arena(1), dz);
  }
  if (!tape.dot[net.output]) {  // no parameter reaches the output
    out.step(Op::fill_zero, Vector{outputs}, 1, {tape.dot[net.output] = out.arena(outputs)});
  }
  const Operand dz_dot = out.arena(outputs);
  loss_step(out, net, batch, Pass::tangent, tape, {}, dz_dot);
  backward(out, net, tape, pass, dz, dz_dot, grad, hu);
}

Operand inner_step(Schedule& out, const Program& net, Operand phi, Operand g, Operand rate, Operand phi_next) {
  out.step(Op::sgd_update, Vector{net.param_count}, 1, {phi_next, phi, g, rate});
  return phi_next;
}

Schedule forward_schedule(const Program& net, int64_t examples, int64_t support_examples) {
  Schedule out;
  const bool joint = net.uses_support_stats();
  if (joint && support_examples < 1) throw std::invalid_argument("batch norm mode \"support\" needs support examples to normalise by");
  const int64_t in = net.input_shape().size(), rows = net.output_shape().size();
  Tape tape;
  tape.params = out.external(Arg::params, net.param_count);
  Operand x = out.external(Arg::query_x, examples * in);
  tape.examples = examples;
  if (joint) {
    const Operand both = out.arena((support_examples + examples) * in);
    out.step(Op::copy, Vector{support_examples * in}, 1, {both, out.external(Arg::support_x, support_examples * in)});
    out.step(Op::copy, Vector{examples * in}, 1, {offset(both, support_examples * in), x});
    x = both;
    tape.examples += support_examples;
  }
  tape.stat_examples = joint ? support_examples : examples;
  forward(out, net, tape, Pass::primal, x, {}, buffers(out, net));
  const Operand z = offset(tape.value[net.output], (tape.examples - examples) * rows);
  out.step(Op::copy, Vector{examples * rows}, 1, {out.external(Arg::output, examples * rows), z});
  return out;
}

Schedule gradient_schedule(const Program& net, int64_t examples, bool weights) {
  Schedule out;
  const Operand params = out.external(Arg::params, net.param_count);
  gradient(out, net, params, support_batch(out, net, examples, weights), out.external(Arg::loss, 1),
           out.external(Arg::grad, net.param_count));
  return out;
}

Schedule adapt_schedule(const Program& net, const Adaptation& how) {
  Schedule out;
  const int64_t P = net.param_count;
  const Vector flat{P};
  Operand phi = out.external(Arg::params, P);
  const Operand adapted = out.external(Arg::adapted, P);
  if (how.inner_steps == 0) {
    out.step(Op::copy, flat, 1, {adapted, phi});
    return out;
  }
  const Batch support = support_batch(out, net, how.support_examples, how.support_weights);
  const Operand rates = out.external(Arg::rates, how.rates_per_step ? how.inner_steps * P : P);
  const Operand losses = out.external(Arg::support_losses, how.inner_steps);
  for (int k = 0; k < how.inner_steps; ++k) {
    const Operand g = out.arena(P);
    gradient(out, net, phi, support, offset(losses, k), g);
    const bool last = k == how.inner_steps - 1;
    phi = inner_step(out, net, phi, g, offset(rates, how.rates_per_step ? k * P : 0), last ? adapted : out.arena(P));
  }
  return out;
}

}  // namespace fastmaml
