// The gradient of a loss and its tangent (the Hessian-vector product) as Steps. All other Schedules are made of them.
// Also the Schedules that are one such pass.
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
    case Loss::Kind::caller:
      return tangent ? Op::caller_loss_jvp : Op::caller_loss;
    case Loss::Kind::none:
      break;
  }
  throw std::invalid_argument("the program has no loss, so it has no gradient");
}

Operand buffers(Schedule& out, const Program& net) { return net.buffer_count ? out.external(Arg::buffers, net.buffer_count) : Operand{}; }

// Labels, or rows shaped like the output. Empty for a loss written in Python, which may hold its own targets.
Operand targets(Schedule& out, const Program& net, Arg arg, int64_t examples) {
  switch (target_of(net.loss.kind)) {
    case Target::label:
      return out.external(arg, examples, Type::label);
    case Target::row:
      return out.external(arg, examples * net.output_shape().size());
    case Target::nothing:
      return {};
  }
  throw std::logic_error("not a loss's target");
}

// Of that argument, where row `rows` starts.
Operand targets_from(const Program& net, Operand y, int64_t rows) {
  switch (target_of(net.loss.kind)) {
    case Target::label:
      return offset(y, rows);
    case Target::row:
      return offset(y, rows * net.output_shape().size());
    case Target::nothing:
      return {};
  }
  throw std::logic_error("not a loss's target");
}

// The loss sees only the last rows of the batch. The gradient by the other rows is zero.
void loss_step(Schedule& out, const Program& net, const Batch& batch, Pass pass, Tape& tape, Operand loss, Operand dz) {
  const int64_t skipped = batch.loss_from * net.output_shape().size(), rows = batch.examples - batch.loss_from;
  const Operand z = offset(tape.value[net.output], skipped);
  const Shape& output = net.output_shape();
  const bool in_python = net.loss.kind == Loss::Kind::caller;
  const Layer layer =
      in_python ? Layer(PythonLoss{output.C, output.H, output.W, output.image, batch.query, batch.first_row}) : Layer(net.loss);
  if (skipped) out.step(Op::fill_zero, Vector{skipped}, 1, {dz});
  dz = offset(dz, skipped);
  if (pass == Pass::tangent) {
    const Operand z_dot = offset(tape.dot[net.output], skipped);
    out.step(loss_op(net.loss, true), layer, rows, {dz, z, z_dot, batch.y, batch.weights});
  } else {
    out.step(loss_op(net.loss, false), layer, rows, {loss, dz, z, batch.y, batch.weights});
  }
}

// The tangent of the loss's gradient by the output.
Operand loss_tangent(Schedule& out, const Program& net, const Batch& batch, Tape& tape) {
  const int64_t outputs = batch.examples * net.output_shape().size();
  if (!tape.dot[net.output]) {  // no parameter reaches the output
    out.step(Op::fill_zero, Vector{outputs}, 1, {tape.dot[net.output] = out.arena(outputs)});
  }
  const Operand dz_dot = out.arena(outputs);
  loss_step(out, net, batch, Pass::tangent, tape, {}, dz_dot);
  return dz_dot;
}

}  // namespace

Batch support_batch(Schedule& out, const Program& net, int64_t examples, bool weights) {
  Batch batch;
  batch.examples = batch.stat_examples = examples;
  batch.x = out.external(Arg::support_x, examples * net.input_shape().size());
  batch.y = targets(out, net, Arg::support_y, examples);
  if (weights) batch.weights = out.external(Arg::support_weights, examples);
  return batch;
}

Batch query_batch(Schedule& out, const Program& net, const InnerLoopSpec& spec, const Batch& support) {
  const int64_t n = spec.query_examples, in = net.input_shape().size();
  Batch batch;
  batch.query = true;
  batch.x = out.external(Arg::query_x, n * in);
  batch.examples = batch.stat_examples = n;
  batch.y = targets(out, net, Arg::query_y, n);
  if (spec.query_weights) batch.weights = out.external(Arg::query_weights, n);
  if (!net.uses_support_stats()) return batch;
  const Operand both = out.arena((support.examples + n) * in);
  out.step(Op::copy, Vector{support.examples * in}, 1, {both, support.x});
  out.step(Op::copy, Vector{n * in}, 1, {offset(both, support.examples * in), batch.x});
  batch.x = both;
  batch.stat_examples = batch.loss_from = support.examples;
  batch.examples = support.examples + n;
  return batch;
}

Batch step_batch(const Program& net, const InnerLoopSpec& spec, const Batch& support, int k) {
  const int64_t rows = spec.loop.minibatch;
  if (rows == 0) return support;
  if (support.examples != rows * spec.loop.steps)
    throw std::invalid_argument("support_x holds " + std::to_string(support.examples) + " examples; " + std::to_string(spec.loop.steps) +
                                " steps of minibatch=" + std::to_string(rows) + " take " + std::to_string(rows * spec.loop.steps));
  Batch batch = support;
  batch.first_row = k * rows;
  batch.examples = batch.stat_examples = rows;
  batch.x = offset(batch.x, batch.first_row * net.input_shape().size());
  batch.y = targets_from(net, batch.y, batch.first_row);
  batch.weights = offset(batch.weights, batch.first_row);
  return batch;
}

Tape values(Schedule& out, const Program& net, Operand params, const Batch& batch) {
  Tape tape;
  tape.examples = batch.examples;
  tape.stat_examples = batch.stat_examples;
  tape.params = params;
  forward(out, net, tape, Pass::primal, batch.x, {}, buffers(out, net));
  return tape;
}

Tape gradient(Schedule& out, const Program& net, Operand params, const Batch& batch, Operand loss, Operand grad) {
  Tape tape = values(out, net, params, batch);
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
  Operand dz;
  if (!stashed) {
    dz = out.arena(batch.examples * net.output_shape().size());
    loss_step(out, net, batch, Pass::primal, tape, out.arena(1), dz);
  }
  backward(out, net, tape, pass, dz, loss_tangent(out, net, batch, tape), grad, hu);
}

void gauss_newton(Schedule& out, const Program& net, Tape tape, Operand u, const Batch& batch, Operand hu) {
  tape.params_dot = u;
  forward(out, net, tape, Pass::tangent, batch.x, {}, buffers(out, net));
  backward(out, net, tape, Pass::primal, loss_tangent(out, net, batch, tape), {}, hu, {});
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

Schedule vjp_schedule(const Program& net, int64_t examples) {
  Schedule out;
  const int64_t rows = examples * net.output_shape().size();
  Tape tape;
  tape.examples = tape.stat_examples = examples;
  tape.params = out.external(Arg::params, net.param_count);
  forward(out, net, tape, Pass::primal, out.external(Arg::support_x, examples * net.input_shape().size()), {}, buffers(out, net));
  out.step(Op::copy, Vector{rows}, 1, {out.external(Arg::output, rows), tape.value[net.output]});
  backward(out, net, tape, Pass::primal, out.external(Arg::output_grad, rows), {}, out.external(Arg::grad, net.param_count), {});
  return out;
}

}  // namespace fastmaml
