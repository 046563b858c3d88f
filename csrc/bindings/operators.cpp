#include "bindings/operators.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "bindings/parameter_list.h"

namespace fastmaml {
namespace {

// Binds the support set of grad, hvp, adapt or solve.
InnerLoopSpec support(CallArguments& arguments, const Tensor& x, const Tensor& y, const MaybeTensor& weights) {
  InnerLoopSpec spec;
  spec.support_examples = arguments.examples(Arg::support_x, "x", x);
  arguments.targets(Arg::support_y, "y", y, spec.support_examples);
  spec.support_weights = arguments.weights(Arg::support_weights, "weights", weights, spec.support_examples);
  return spec;
}

template <class Real>
void sum_into(const Tensor& to, const Tensor& loss, const MaybeTensor& task_weights) {
  const int64_t tasks = loss.numel();
  const auto* losses = static_cast<const Real*>(loss.const_data_ptr());
  double sum = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    const auto strided = [&](const Tensor& w) { return static_cast<const Real*>(w.const_data_ptr())[t * w.stride(0)]; };
    sum += double(losses[t]) * (task_weights ? double(strided(*task_weights)) : 1.0);
  }
  *static_cast<Real*>(to.mutable_data_ptr()) = Real(task_weights ? sum : sum / double(tasks));
}

// [1, P] that repeats one number and stores it once
Tensor repeated(double value, int64_t P, torch::headeronly::ScalarType type) {
  const bool single = type == torch::headeronly::ScalarType::Float;
  const int64_t sizes[] = {1, P}, strides[] = {1, 0};
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      2, sizes, strides, single ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64(), aoti_torch_device_type_cpu(), 0, &made));
  const Tensor x(made);
  if (single)
    *static_cast<float*>(x.mutable_data_ptr()) = float(value);
  else
    *static_cast<double*>(x.mutable_data_ptr()) = value;
  return x;
}

// Losses [T] reduced to one number, as their gradients are.
Tensor weighted_sum(const Tensor& loss, const MaybeTensor& task_weights) {
  const Tensor sum = host_executor()->empty({}, loss.scalar_type());
  loss.scalar_type() == torch::headeronly::ScalarType::Float ? sum_into<float>(sum, loss, task_weights)
                                                             : sum_into<double>(sum, loss, task_weights);
  return sum;
}

// Binds the inner loop's options of adapt and meta_gradient. Returns the number of rows of the rates.
int64_t given_loop(CallArguments& arguments, InnerLoopSpec& spec, const std::string& text, const Tensor& rates,
                   const MaybeTensor& step_rows, const MaybeTensor& lam, const MaybeTensor& mask) {
  spec.loop = *inner_loop_of(text);
  const auto [rate_rows, uniform] = arguments.rates(rates, spec.loop);
  spec.rates_per_step = rate_rows > 1;
  spec.uniform_rate = uniform;
  arguments.step_rows(step_rows, spec.loop);
  if (arguments.shared(Arg::lam, "lam", lam, 1) != spec.loop.proximal)
    throw std::invalid_argument("lam and the word proximal=1 must be given together, but the inner loop is \"" + text + "\"");
  spec.mask = mask.has_value();
  if (mask) arguments.shared_params(Arg::mask, "mask", *mask);
  return rate_rows;
}

}  // namespace

Tensor forward_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                    const MaybeTensor& support_x, const Tensor& buffers) {
  CallArguments arguments(program, backend, params);
  CallSpec call;
  const int64_t N = call.spec.query_examples = arguments.examples(Arg::query_x, "x", x);
  if (support_x && arguments.program().uses_support_stats())
    call.spec.support_examples = arguments.examples(Arg::support_x, "support_x", *support_x);
  arguments.params(Arg::params, "params", params);
  arguments.buffers(buffers);
  arguments.result(Arg::output, N * arguments.program().output_shape().size());
  arguments.run(call);
  return arguments.outputs(Arg::output, N);
}

std::tuple<Tensor, Tensor> grad_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                     const Tensor& y, const MaybeTensor& weights, const Tensor& buffers) {
  CallArguments arguments(program, backend, params);
  CallSpec call;
  call.computation = Computation::gradient;
  call.spec = support(arguments, x, y, weights);
  arguments.params(Arg::params, "params", params);
  arguments.buffers(buffers);
  arguments.result(Arg::loss, 1);
  arguments.params_result(Arg::grad);
  arguments.run(call);
  return {arguments.values(Arg::loss), arguments.params(Arg::grad)};
}

Tensor hvp_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x, const Tensor& y,
                const MaybeTensor& weights, const Tensor& v, const Tensor& buffers) {
  CallArguments arguments(program, backend, params);
  CallSpec call;
  call.computation = Computation::hvp;
  call.spec = support(arguments, x, y, weights);
  arguments.params(Arg::params, "params", params);
  arguments.params_of_tasks(Arg::params_dot, "v", v);
  arguments.finite("x", x);
  arguments.finite("y", y);
  arguments.finite("v", v);
  arguments.buffers(buffers);
  arguments.params_result(Arg::grad_dot);
  arguments.run(call);
  return arguments.params(Arg::grad_dot);
}

std::tuple<Tensor, Tensor, Tensor> linearise_call(const std::string& program, const std::string& backend, bool gauss_newton,
                                                  const Tensor& params, const Tensor& x, const Tensor& y, const MaybeTensor& weights,
                                                  const Tensor& buffers) {
  CallArguments arguments(program, backend, params);
  CallSpec call;
  call.computation = Computation::linearise;
  call.curvature = gauss_newton ? Curvature::gauss_newton : Curvature::hessian;
  call.spec = support(arguments, x, y, weights);
  arguments.params(Arg::params, "params", params);
  arguments.buffers(buffers);
  CallArguments::Tapes made = arguments.new_tapes(call);
  arguments.run(call);
  arguments.finish(made);
  return {made.real, made.index, made.tap};
}

Tensor curvature_call(const std::string& program, const std::string& backend, bool gauss_newton, const Tensor& params, const Tensor& x,
                      const Tensor& y, const MaybeTensor& weights, const Tensor& tape, const Tensor& tape_index, const Tensor& tape_tap,
                      const Tensor& v, const Tensor& buffers) {
  CallArguments arguments(program, backend, params);
  CallSpec call;
  call.computation = Computation::curvature;
  call.curvature = gauss_newton ? Curvature::gauss_newton : Curvature::hessian;
  call.spec = support(arguments, x, y, weights);
  arguments.params(Arg::params, "params", params);
  arguments.params_of_tasks(Arg::params_dot, "v", v);
  arguments.buffers(buffers);
  arguments.tapes(call, {tape, tape_index, tape_tap});
  arguments.params_result(Arg::grad_dot);
  arguments.run(call);
  return arguments.params(Arg::grad_dot);
}

std::tuple<Tensor, Tensor> vjp_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                    const Tensor& dy, const Tensor& buffers) {
  CallArguments arguments(program, backend, params);
  CallSpec call;
  call.computation = Computation::vjp;
  const int64_t N = call.spec.support_examples = arguments.examples(Arg::support_x, "x", x);
  arguments.outputs(Arg::output_grad, "dy", dy, N);
  arguments.params(Arg::params, "params", params);
  arguments.buffers(buffers);
  arguments.result(Arg::output, N * arguments.program().output_shape().size());
  arguments.params_result(Arg::grad);
  arguments.run(call);
  return {arguments.outputs(Arg::output, N), arguments.params(Arg::grad)};
}

std::tuple<Tensor, Tensor, Tensor> adapt_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                              const Tensor& y, const MaybeTensor& weights, const Tensor& rates, const std::string& loop,
                                              const MaybeTensor& step_rows, const MaybeTensor& lam, const MaybeTensor& mask,
                                              const MaybeTensor& state, const MaybeTensor& step_count, const Tensor& buffers) {
  CallArguments arguments(program, backend, params);
  CallSpec call;
  call.computation = Computation::adapt;
  InnerLoopSpec& spec = call.spec = support(arguments, x, y, weights);
  given_loop(arguments, spec, loop, rates, step_rows, lam, mask);
  const int K = spec.loop.steps, S = spec.loop.states();
  spec.state = arguments.state(state, S);
  spec.step_count = arguments.shared(Arg::step_count, "step_count", step_count, 1);
  arguments.params(Arg::params, "params", params);
  arguments.buffers(buffers);
  const int64_t P = arguments.program().param_count;
  arguments.params_result(Arg::adapted);
  arguments.result(Arg::support_losses, K);
  S ? arguments.params_result(Arg::state_next, S) : arguments.result(Arg::state_next, 0);
  arguments.run(call);
  return {arguments.params(Arg::adapted), arguments.values(Arg::support_losses, K),
          S ? torch::stable::view(arguments.params(Arg::state_next), {arguments.tasks(), S * P}) : arguments.values(Arg::state_next, 0)};
}

MetaGradientResults meta_gradient_call(const std::string& program, const std::string& backend, const Tensor& theta, const Tensor& support_x,
                                       const Tensor& support_y, const MaybeTensor& support_weights, const Tensor& query_x,
                                       const Tensor& query_y, const MaybeTensor& query_weights, const MaybeTensor& task_weights,
                                       const Tensor& rates, const std::string& loop_text, const std::string& memory,
                                       const MaybeTensor& loss_weights, const MaybeTensor& step_rows, const MaybeTensor& lam,
                                       const MaybeTensor& mask, const Tensor& buffers) {
  CallArguments arguments(program, backend, theta);
  CallSpec call;
  call.computation = Computation::meta_gradient;
  call.memory = memory_named(memory);
  InnerLoopSpec& spec = call.spec;
  spec.support_examples = arguments.examples(Arg::support_x, "support_x", support_x);
  spec.query_examples = arguments.examples(Arg::query_x, "query_x", query_x);
  arguments.targets(Arg::support_y, "support_y", support_y, spec.support_examples);
  arguments.targets(Arg::query_y, "query_y", query_y, spec.query_examples);
  arguments.finite("support_x", support_x);
  arguments.finite("support_y", support_y);
  arguments.finite("query_x", query_x);
  arguments.finite("query_y", query_y);
  spec.support_weights = arguments.weights(Arg::support_weights, "support_weights", support_weights, spec.support_examples);
  spec.query_weights = arguments.weights(Arg::query_weights, "query_weights", query_weights, spec.query_examples);
  const int64_t rate_rows = given_loop(arguments, spec, loop_text, rates, step_rows, lam, mask);
  const InnerLoop& loop = spec.loop;
  const int64_t K = loop.steps, P = arguments.program().param_count, queries = int64_t(loop.queries.size());
  spec.loss_weights = arguments.shared(Arg::loss_weights, "loss_weights", loss_weights, K + 1);
  if (loop.per_task && task_weights)
    throw std::invalid_argument("task_weights weigh a sum over tasks, but an inner loop with per_task=1 has no sum");
  if (loop.per_task)
    arguments.params(Arg::params, "theta", theta);
  else
    arguments.shared_params(Arg::params, "theta", theta);
  arguments.buffers(buffers);
  const bool has_rate_grad = loop.rate_grad && K > 0, has_rows_grad = !loop.rows.empty() && K > 0;
  arguments.result(Arg::loss, 1);
  arguments.task_weights(task_weights);
  loop.per_task ? arguments.params_result(Arg::grad) : arguments.summed_params(Arg::grad);
  arguments.result(Arg::output, spec.query_examples * arguments.program().output_shape().size());
  arguments.result(Arg::support_losses, K);
  if (spec.loss_weights) arguments.result(Arg::query_losses, queries);
  if (has_rate_grad && loop.per_task) arguments.params_result(Arg::rate_grad, rate_rows);
  if (has_rate_grad && !loop.per_task) arguments.summed_params(Arg::rate_grad, rate_rows);
  if (has_rows_grad)
    loop.per_task ? arguments.result(Arg::step_rows_grad, step_rows->numel()) : arguments.summed_step_rows(Arg::step_rows_grad, loop);
  arguments.run(call);

  const Tensor query_losses = spec.loss_weights ? arguments.values(Arg::query_losses, queries) : arguments.values(Arg::loss, 1);
  const Tensor loss = arguments.values(Arg::loss), output = arguments.outputs(Arg::output, spec.query_examples);
  const Tensor support_losses = arguments.values(Arg::support_losses, K);
  Tensor rate_grad = arguments.nothing(), step_rows_grad = arguments.nothing();
  if (has_rate_grad) rate_grad = arguments.params(Arg::rate_grad);
  if (loop.rate_grad && !has_rate_grad)
    rate_grad = loop.per_task ? torch::stable::new_zeros(theta, {arguments.tasks(), rate_rows, P})
                              : torch::stable::new_zeros(theta, {rate_rows, P});
  if (has_rows_grad) step_rows_grad = arguments.step_rows(Arg::step_rows_grad, loop);
  const Tensor grad = arguments.params(Arg::grad);
  const Tensor total = loss.is_cpu() && !loop.per_task ? weighted_sum(loss, task_weights) : arguments.nothing();
  return {loss, grad, output, support_losses, rate_grad, step_rows_grad, query_losses, total};
}

MetaGradientResults plain_meta_gradient_call(const std::string& program, const std::string& backend, const std::vector<Tensor>& theta,
                                             const Tensor& support_x, const Tensor& support_y, const Tensor& query_x, const Tensor& query_y,
                                             double rate, const std::string& loop, const std::string& memory) {
  const Tensor flat = concatenated(theta);
  const auto type = flat.scalar_type();
  // The executor is destroyed at once. Calls reuse the latest returned memory, and this call should get the previous call's.
  const Tensor no_buffers = host_executor()->empty({0}, type), rates = repeated(rate, flat.numel(), type);
  const MaybeTensor none;
  return meta_gradient_call(program, backend, flat, support_x, support_y, none, query_x, query_y, none, none, rates, loop, memory, none,
                            none, none, none, no_buffers);
}

std::tuple<Tensor, Tensor, Tensor> solve_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                              const Tensor& y, const MaybeTensor& weights, const Tensor& v, const MaybeTensor& mask,
                                              double lam, int64_t steps, double damping, double stop, const Tensor& buffers) {
  if (!(lam > 0)) throw std::invalid_argument("lam is " + std::to_string(lam) + "; it must be positive");
  CallArguments arguments(program, backend, params);
  CallSpec call;
  call.computation = Computation::solve;
  call.spec = support(arguments, x, y, weights);
  if (steps < 0 || steps > 1'000'000)
    throw std::invalid_argument("steps is " + std::to_string(steps) + "; it must be at least 0 and at most a million");
  call.solve_steps = static_cast<int>(steps);
  arguments.params(Arg::params, "params", params);
  arguments.params_of_tasks(Arg::params_dot, "v", v);
  arguments.buffers(buffers);
  call.spec.mask = mask.has_value();
  if (mask) arguments.shared_params(Arg::mask, "mask", *mask);
  arguments.numbers(Arg::cg_settings, {lam, damping, stop});
  arguments.params_result(Arg::solution);
  arguments.result(Arg::cg_history, 1 + steps);
  arguments.result(Arg::cg_state, 5);
  arguments.run(call);
  return {arguments.params(Arg::solution), arguments.values(Arg::cg_history, 1 + steps), arguments.values(Arg::cg_state, 5)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> passes_call(const std::string& program, const std::string& backend, bool dual,
                                                                       const Tensor& params, const Tensor& params_dot, const Tensor& x,
                                                                       const Tensor& x_dot, const Tensor& dy, const Tensor& dy_dot,
                                                                       const Tensor& buffers) {
  CallArguments arguments(program, backend, params);
  CallSpec call;
  call.computation = Computation::passes;
  call.dual = dual;
  const int64_t N = call.spec.support_examples = arguments.examples(Arg::support_x, "x", x);
  if (arguments.examples(Arg::support_x_dot, "x_dot", x_dot) != N)
    throw std::invalid_argument("x_dot must hold " + std::to_string(N) + " examples, as x does");
  arguments.outputs(Arg::output_grad, "dy", dy, N);
  arguments.outputs(Arg::output_grad_dot, "dy_dot", dy_dot, N);
  arguments.params(Arg::params, "params", params);
  arguments.params(Arg::params_dot, "params_dot", params_dot);
  arguments.buffers(buffers);
  const int64_t in = N * arguments.program().input_shape().size(), out = N * arguments.program().output_shape().size();
  for (Arg arg : {Arg::output, Arg::output_dot}) arguments.result(arg, out);
  for (Arg arg : {Arg::input_grad, Arg::input_grad_dot}) arguments.result(arg, in);
  for (Arg arg : {Arg::grad, Arg::grad_dot}) arguments.params_result(arg);
  arguments.run(call);
  return {arguments.outputs(Arg::output, N),        arguments.outputs(Arg::output_dot, N), arguments.inputs(Arg::input_grad, N),
          arguments.inputs(Arg::input_grad_dot, N), arguments.params(Arg::grad),           arguments.params(Arg::grad_dot)};
}

}  // namespace fastmaml
