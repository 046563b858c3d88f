#include "bindings/calls.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>

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

int step_count(const char* name, int64_t steps, int64_t least) {
  if (steps < least || steps > 1'000'000)
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(steps) + "; it must be at least " + std::to_string(least) +
                                " and at most a million");
  return static_cast<int>(steps);
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
  arrays.result(Arg::grad, arrays.program().param_count);
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
  arrays.buffers(buffers);
  arrays.result(Arg::grad_dot, arrays.program().param_count);
  arrays.run(work);
  return arrays.params(Arg::grad_dot);
}

std::tuple<Tensor, Tensor> adapt_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                      const Tensor& y, const MaybeTensor& weights, const Tensor& rates, int64_t inner_steps,
                                      const Tensor& buffers) {
  Arrays arrays(program, backend, params);
  Work work;
  work.kind = Kind::adapt;
  work.how = support(arrays, x, y, weights);
  const int K = work.how.inner_steps = step_count("inner_steps", inner_steps, 0);
  work.how.rates_per_step = arrays.rates(rates, K) > 1;
  arrays.params(Arg::params, "params", params);
  arrays.buffers(buffers);
  arrays.result(Arg::adapted, arrays.program().param_count);
  arrays.result(Arg::support_losses, K);
  arrays.run(work);
  return {arrays.params(Arg::adapted), arrays.values(Arg::support_losses, K)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> meta_gradient_call(const std::string& program, const std::string& backend,
                                                                      const Tensor& theta, const Tensor& support_x, const Tensor& support_y,
                                                                      const MaybeTensor& support_weights, const Tensor& query_x,
                                                                      const Tensor& query_y, const MaybeTensor& query_weights,
                                                                      const MaybeTensor& task_weights, const Tensor& rates,
                                                                      int64_t inner_steps, bool first_order, const std::string& memory,
                                                                      bool rate_grad, const Tensor& buffers) {
  Arrays arrays(program, backend, theta);
  Work work;
  work.kind = Kind::meta_gradient;
  work.memory = memory_named(memory);
  Adaptation& how = work.how;
  how.support_examples = arrays.examples(Arg::support_x, "support_x", support_x);
  how.query_examples = arrays.examples(Arg::query_x, "query_x", query_x);
  arrays.targets(Arg::support_y, "support_y", support_y, how.support_examples);
  arrays.targets(Arg::query_y, "query_y", query_y, how.query_examples);
  how.support_weights = arrays.weights(Arg::support_weights, "support_weights", support_weights, how.support_examples);
  how.query_weights = arrays.weights(Arg::query_weights, "query_weights", query_weights, how.query_examples);
  const int K = how.inner_steps = step_count("inner_steps", inner_steps, 0);
  const int64_t rows = arrays.rates(rates, K), P = arrays.program().param_count;
  how.rates_per_step = rows > 1;
  how.first_order = first_order;
  how.rate_grad = rate_grad;
  arrays.shared_params(Arg::params, "theta", theta);
  arrays.buffers(buffers);
  arrays.result(Arg::loss, 1);
  arrays.result(Arg::grad, P);
  arrays.result(Arg::output, how.query_examples * arrays.program().output_shape().size());
  arrays.result(Arg::support_losses, K);
  if (rate_grad) arrays.result(Arg::rate_grad, rows * P);
  arrays.run(work);
  Tensor by_rates = torch::stable::new_zeros(theta, rate_grad ? std::vector<int64_t>{rows, P} : std::vector<int64_t>{0});
  if (rate_grad && K > 0) by_rates = arrays.reduced_params(Arg::rate_grad, rows, task_weights);
  return {arrays.values(Arg::loss), torch::stable::view(arrays.reduced_params(Arg::grad, 1, task_weights), {P}),
          arrays.outputs(Arg::output, how.query_examples), arrays.values(Arg::support_losses, K), by_rates};
}

std::tuple<Tensor, Tensor> solve_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                      const Tensor& y, const MaybeTensor& weights, const Tensor& v, double lam, int64_t steps,
                                      double damping, const Tensor& buffers) {
  if (!(lam > 0)) throw std::invalid_argument("lam is " + std::to_string(lam) + "; it must be positive");
  Arrays arrays(program, backend, params);
  Work work;
  work.kind = Kind::solve;
  work.how = support(arrays, x, y, weights);
  work.solve_steps = step_count("steps", steps, 0);
  arrays.params(Arg::params, "params", params);
  arrays.params_of_tasks(Arg::params_dot, "v", v);
  arrays.buffers(buffers);
  arrays.numbers(Arg::cg_settings, {lam, damping});
  arrays.result(Arg::solution, arrays.program().param_count);
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
  for (Arg arg : {Arg::grad, Arg::grad_dot}) arrays.result(arg, arrays.program().param_count);
  arrays.run(work);
  return {arrays.outputs(Arg::output, N),        arrays.outputs(Arg::output_dot, N), arrays.inputs(Arg::input_grad, N),
          arrays.inputs(Arg::input_grad_dot, N), arrays.params(Arg::grad),           arrays.params(Arg::grad_dot)};
}

}  // namespace fastmaml
