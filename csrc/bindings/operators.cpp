#include "bindings/operators.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "bindings/parameter_list.h"

namespace fastmaml {
namespace {

// The examples of grad, hvp, adapt and solve.
Adaptation support(Arrays& arrays, const Tensor& x, const Tensor& y, const MaybeTensor& weights) {
  Adaptation how;
  how.support_examples = arrays.examples(Arg::support_x, "x", x);
  arrays.targets(Arg::support_y, "y", y, how.support_examples);
  how.support_weights = arrays.weights(Arg::support_weights, "weights", weights, how.support_examples);
  return how;
}

template <class Real>
void sum_into(const Tensor& to, const Tensor& loss, const MaybeTensor& task_weights) {
  const int64_t tasks = loss.numel();
  const auto* of_task = static_cast<const Real*>(loss.const_data_ptr());
  double sum = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    const auto strided = [&](const Tensor& w) { return static_cast<const Real*>(w.const_data_ptr())[t * w.stride(0)]; };
    sum += double(of_task[t]) * (task_weights ? double(strided(*task_weights)) : 1.0);
  }
  *static_cast<Real*>(to.mutable_data_ptr()) = Real(task_weights ? sum : sum / double(tasks));
}

// [1, P] of one number, which is stored once
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

// The losses [T] as the one number whose gradient the reduced ones are.
Tensor weighted_sum(const Tensor& loss, const MaybeTensor& task_weights) {
  const Tensor sum = host_space()->empty({}, loss.scalar_type());
  loss.scalar_type() == torch::headeronly::ScalarType::Float ? sum_into<float>(sum, loss, task_weights)
                                                             : sum_into<double>(sum, loss, task_weights);
  return sum;
}

// What adapt and meta_gradient are told of the inner loop. Returns the rows of the rates.
int64_t given_loop(Arrays& arrays, Adaptation& how, const std::string& text, const Tensor& rates, const MaybeTensor& step_rows,
                   const MaybeTensor& lam, const MaybeTensor& mask) {
  how.loop = *inner_loop_of(text);
  const auto [rate_rows, uniform] = arrays.rates(rates, how.loop);
  how.rates_per_step = rate_rows > 1;
  how.uniform_rate = uniform;
  arrays.step_rows(step_rows, how.loop);
  if (arrays.shared(Arg::lam, "lam", lam, 1) != how.loop.proximal)
    throw std::invalid_argument("lam and the word proximal=1 go together, but the inner loop is \"" + text + "\"");
  how.mask = mask.has_value();
  if (mask) arrays.shared_params(Arg::mask, "mask", *mask);
  return rate_rows;
}

}  // namespace

Tensor forward_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                    const MaybeTensor& support_x, const Tensor& buffers) {
  Arrays arrays(program, backend, params);
  Work work;
  const int64_t N = work.how.query_examples = arrays.examples(Arg::query_x, "x", x);
  if (support_x && arrays.program().uses_support_stats())
    work.how.support_examples = arrays.examples(Arg::support_x, "support_x", *support_x);
  arrays.params(Arg::params, "params", params);
  arrays.buffers(buffers);
  arrays.result(Arg::output, N * arrays.program().output_shape().size());
  arrays.run(work);
  return arrays.outputs(Arg::output, N);
}

std::tuple<Tensor, Tensor> grad_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                     const Tensor& y, const MaybeTensor& weights, const Tensor& buffers) {
  Arrays arrays(program, backend, params);
  Work work;
  work.kind = Kind::gradient;
  work.how = support(arrays, x, y, weights);
  arrays.params(Arg::params, "params", params);
  arrays.buffers(buffers);
  arrays.result(Arg::loss, 1);
  arrays.params_result(Arg::grad);
  arrays.run(work);
  return {arrays.values(Arg::loss), arrays.params(Arg::grad)};
}

Tensor hvp_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x, const Tensor& y,
                const MaybeTensor& weights, const Tensor& v, const Tensor& buffers) {
  Arrays arrays(program, backend, params);
  Work work;
  work.kind = Kind::hvp;
  work.how = support(arrays, x, y, weights);
  arrays.params(Arg::params, "params", params);
  arrays.params_of_tasks(Arg::params_dot, "v", v);
  arrays.finite("x", x);
  arrays.finite("y", y);
  arrays.finite("v", v);
  arrays.buffers(buffers);
  arrays.params_result(Arg::grad_dot);
  arrays.run(work);
  return arrays.params(Arg::grad_dot);
}

std::tuple<Tensor, Tensor, Tensor> linearise_call(const std::string& program, const std::string& backend, bool gauss_newton,
                                                  const Tensor& params, const Tensor& x, const Tensor& y, const MaybeTensor& weights,
                                                  const Tensor& buffers) {
  Arrays arrays(program, backend, params);
  Work work;
  work.kind = Kind::linearise;
  work.curvature = gauss_newton ? Curvature::gauss_newton : Curvature::hessian;
  work.how = support(arrays, x, y, weights);
  arrays.params(Arg::params, "params", params);
  arrays.buffers(buffers);
  Arrays::Tapes made = arrays.new_tapes(work);
  arrays.run(work);
  arrays.finish(made);
  return {made.real, made.index, made.tap};
}

Tensor curvature_call(const std::string& program, const std::string& backend, bool gauss_newton, const Tensor& params, const Tensor& x,
                      const Tensor& y, const MaybeTensor& weights, const Tensor& tape, const Tensor& tape_index, const Tensor& tape_tap,
                      const Tensor& v, const Tensor& buffers) {
  Arrays arrays(program, backend, params);
  Work work;
  work.kind = Kind::curvature;
  work.curvature = gauss_newton ? Curvature::gauss_newton : Curvature::hessian;
  work.how = support(arrays, x, y, weights);
  arrays.params(Arg::params, "params", params);
  arrays.params_of_tasks(Arg::params_dot, "v", v);
  arrays.buffers(buffers);
  arrays.tapes(work, {tape, tape_index, tape_tap});
  arrays.params_result(Arg::grad_dot);
  arrays.run(work);
  return arrays.params(Arg::grad_dot);
}

std::tuple<Tensor, Tensor> vjp_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                    const Tensor& dy, const Tensor& buffers) {
  Arrays arrays(program, backend, params);
  Work work;
  work.kind = Kind::vjp;
  const int64_t N = work.how.support_examples = arrays.examples(Arg::support_x, "x", x);
  arrays.outputs(Arg::output_grad, "dy", dy, N);
  arrays.params(Arg::params, "params", params);
  arrays.buffers(buffers);
  arrays.result(Arg::output, N * arrays.program().output_shape().size());
  arrays.params_result(Arg::grad);
  arrays.run(work);
  return {arrays.outputs(Arg::output, N), arrays.params(Arg::grad)};
}

std::tuple<Tensor, Tensor, Tensor> adapt_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                              const Tensor& y, const MaybeTensor& weights, const Tensor& rates, const std::string& loop,
                                              const MaybeTensor& step_rows, const MaybeTensor& lam, const MaybeTensor& mask,
                                              const MaybeTensor& state, const MaybeTensor& step_count, const Tensor& buffers) {
  Arrays arrays(program, backend, params);
  Work work;
  work.kind = Kind::adapt;
  Adaptation& how = work.how = support(arrays, x, y, weights);
  given_loop(arrays, how, loop, rates, step_rows, lam, mask);
  const int K = how.loop.steps, S = how.loop.states();
  how.state = arrays.state(state, S);
  how.step_count = arrays.shared(Arg::step_count, "step_count", step_count, 1);
  arrays.params(Arg::params, "params", params);
  arrays.buffers(buffers);
  const int64_t P = arrays.program().param_count;
  arrays.params_result(Arg::adapted);
  arrays.result(Arg::support_losses, K);
  S ? arrays.params_result(Arg::state_next, S) : arrays.result(Arg::state_next, 0);
  arrays.run(work);
  return {arrays.params(Arg::adapted), arrays.values(Arg::support_losses, K),
          S ? torch::stable::view(arrays.params(Arg::state_next), {arrays.tasks(), S * P}) : arrays.values(Arg::state_next, 0)};
}

MetaGradientResults meta_gradient_call(const std::string& program, const std::string& backend, const Tensor& theta, const Tensor& support_x,
                                       const Tensor& support_y, const MaybeTensor& support_weights, const Tensor& query_x,
                                       const Tensor& query_y, const MaybeTensor& query_weights, const MaybeTensor& task_weights,
                                       const Tensor& rates, const std::string& loop_text, const std::string& memory,
                                       const MaybeTensor& loss_weights, const MaybeTensor& step_rows, const MaybeTensor& lam,
                                       const MaybeTensor& mask, const Tensor& buffers) {
  Arrays arrays(program, backend, theta);
  Work work;
  work.kind = Kind::meta_gradient;
  work.memory = memory_named(memory);
  Adaptation& how = work.how;
  how.support_examples = arrays.examples(Arg::support_x, "support_x", support_x);
  how.query_examples = arrays.examples(Arg::query_x, "query_x", query_x);
  arrays.targets(Arg::support_y, "support_y", support_y, how.support_examples);
  arrays.targets(Arg::query_y, "query_y", query_y, how.query_examples);
  arrays.finite("support_x", support_x);
  arrays.finite("support_y", support_y);
  arrays.finite("query_x", query_x);
  arrays.finite("query_y", query_y);
  how.support_weights = arrays.weights(Arg::support_weights, "support_weights", support_weights, how.support_examples);
  how.query_weights = arrays.weights(Arg::query_weights, "query_weights", query_weights, how.query_examples);
  const int64_t rate_rows = given_loop(arrays, how, loop_text, rates, step_rows, lam, mask);
  const InnerLoop& loop = how.loop;
  const int64_t K = loop.steps, P = arrays.program().param_count, queries = int64_t(loop.queries.size());
  how.loss_weights = arrays.shared(Arg::loss_weights, "loss_weights", loss_weights, K + 1);
  if (loop.per_task && task_weights)
    throw std::invalid_argument("task_weights are given to an inner loop with per_task=1, which reduces nothing");
  if (loop.per_task)
    arrays.params(Arg::params, "theta", theta);
  else
    arrays.shared_params(Arg::params, "theta", theta);
  arrays.buffers(buffers);
  const bool rate_grad = loop.rate_grad && K > 0, rows_grad = !loop.rows.empty() && K > 0;
  arrays.result(Arg::loss, 1);
  arrays.task_weights(task_weights);
  loop.per_task ? arrays.params_result(Arg::grad) : arrays.summed_params(Arg::grad);
  arrays.result(Arg::output, how.query_examples * arrays.program().output_shape().size());
  arrays.result(Arg::support_losses, K);
  if (how.loss_weights) arrays.result(Arg::query_losses, queries);
  if (rate_grad && loop.per_task) arrays.params_result(Arg::rate_grad, rate_rows);
  if (rate_grad && !loop.per_task) arrays.summed_params(Arg::rate_grad, rate_rows);
  if (rows_grad)
    loop.per_task ? arrays.result(Arg::step_rows_grad, step_rows->numel()) : arrays.summed_step_rows(Arg::step_rows_grad, loop);
  arrays.run(work);

  const Tensor query_losses = how.loss_weights ? arrays.values(Arg::query_losses, queries) : arrays.values(Arg::loss, 1);
  const Tensor loss = arrays.values(Arg::loss), output = arrays.outputs(Arg::output, how.query_examples);
  const Tensor support_losses = arrays.values(Arg::support_losses, K);
  Tensor by_rates = arrays.nothing(), by_rows = arrays.nothing();
  if (rate_grad) by_rates = arrays.params(Arg::rate_grad);
  if (loop.rate_grad && !rate_grad)
    by_rates =
        loop.per_task ? torch::stable::new_zeros(theta, {arrays.tasks(), rate_rows, P}) : torch::stable::new_zeros(theta, {rate_rows, P});
  if (rows_grad) by_rows = arrays.step_rows(Arg::step_rows_grad, loop);
  const Tensor grad = arrays.params(Arg::grad);
  const Tensor total = loss.is_cpu() && !loop.per_task ? weighted_sum(loss, task_weights) : arrays.nothing();
  return {loss, grad, output, support_losses, by_rates, by_rows, query_losses, total};
}

MetaGradientResults plain_meta_gradient_call(const std::string& program, const std::string& backend, const std::vector<Tensor>& theta,
                                             const Tensor& support_x, const Tensor& support_y, const Tensor& query_x, const Tensor& query_y,
                                             double rate, const std::string& loop, const std::string& memory) {
  const Tensor flat = joined(theta);
  const auto type = flat.scalar_type();
  // The space goes at once: the next call takes the memory that was given back last, and this is to be that of the call before.
  const Tensor no_buffers = host_space()->empty({0}, type), rates = repeated(rate, flat.numel(), type);
  const MaybeTensor none;
  return meta_gradient_call(program, backend, flat, support_x, support_y, none, query_x, query_y, none, none, rates, loop, memory, none,
                            none, none, none, no_buffers);
}

std::tuple<Tensor, Tensor> solve_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                      const Tensor& y, const MaybeTensor& weights, const Tensor& v, double lam, int64_t steps,
                                      double damping, const Tensor& buffers) {
  if (!(lam > 0)) throw std::invalid_argument("lam is " + std::to_string(lam) + "; it must be positive");
  Arrays arrays(program, backend, params);
  Work work;
  work.kind = Kind::solve;
  work.how = support(arrays, x, y, weights);
  if (steps < 0 || steps > 1'000'000)
    throw std::invalid_argument("steps is " + std::to_string(steps) + "; it must be at least 0 and at most a million");
  work.solve_steps = static_cast<int>(steps);
  arrays.params(Arg::params, "params", params);
  arrays.params_of_tasks(Arg::params_dot, "v", v);
  arrays.buffers(buffers);
  arrays.numbers(Arg::cg_settings, {lam, damping});
  arrays.params_result(Arg::solution);
  arrays.result(Arg::residual, 1);
  arrays.run(work);
  return {arrays.params(Arg::solution), arrays.values(Arg::residual)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> passes_call(const std::string& program, const std::string& backend, bool dual,
                                                                       const Tensor& params, const Tensor& params_dot, const Tensor& x,
                                                                       const Tensor& x_dot, const Tensor& dy, const Tensor& dy_dot,
                                                                       const Tensor& buffers) {
  Arrays arrays(program, backend, params);
  Work work;
  work.kind = Kind::passes;
  work.dual = dual;
  const int64_t N = work.how.support_examples = arrays.examples(Arg::support_x, "x", x);
  if (arrays.examples(Arg::support_x_dot, "x_dot", x_dot) != N)
    throw std::invalid_argument("x_dot holds another number of examples than x's " + std::to_string(N));
  arrays.outputs(Arg::output_grad, "dy", dy, N);
  arrays.outputs(Arg::output_grad_dot, "dy_dot", dy_dot, N);
  arrays.params(Arg::params, "params", params);
  arrays.params(Arg::params_dot, "params_dot", params_dot);
  arrays.buffers(buffers);
  const int64_t in = N * arrays.program().input_shape().size(), out = N * arrays.program().output_shape().size();
  for (Arg arg : {Arg::output, Arg::output_dot}) arrays.result(arg, out);
  for (Arg arg : {Arg::input_grad, Arg::input_grad_dot}) arrays.result(arg, in);
  for (Arg arg : {Arg::grad, Arg::grad_dot}) arrays.params_result(arg);
  arrays.run(work);
  return {arrays.outputs(Arg::output, N),        arrays.outputs(Arg::output_dot, N), arrays.inputs(Arg::input_grad, N),
          arrays.inputs(Arg::input_grad_dot, N), arrays.params(Arg::grad),           arrays.params(Arg::grad_dot)};
}

}  // namespace fastmaml
