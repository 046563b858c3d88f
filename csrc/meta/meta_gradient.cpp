// The whole meta-gradient of one task as one flat Schedule (ALGORITHMS sections 1.1 and 1.2; MAML, Finn et al. 2017):
//
//   phi[0] = theta                         phi[k+1]  = phi[k] - a * grad_support(phi[k])
//   lambda[K] = grad_query(phi[K])         lambda[k] = lambda[k+1] - H_support(phi[k]) (a * lambda[k+1])
//
// The meta-gradient is lambda[0]; first-order MAML keeps lambda[K]. The rate is per parameter, so scaling comes before the
// Hessian: (diag(a) H)^T v = H (a * v). The gradient by the rate is da[k] = -grad_support(phi[k]) * lambda[k+1].
#include <vector>

#include "meta/meta.h"

namespace fastmaml {
namespace {

// The query set; in `support` batch-norm mode the support images run along, ahead of it, and give the statistics.
Batch query_batch(Schedule& out, const Program& net, const Adaptation& how, const Batch& support) {
  const int64_t n = how.query_examples, in = net.input_shape().size();
  Batch batch;
  batch.x = out.external(Arg::query_x, n * in);
  batch.examples = batch.stat_examples = n;
  if (net.loss.kind == Loss::Kind::cross_entropy)
    batch.y = out.external(Arg::query_y, n, Type::label);
  else
    batch.y = out.external(Arg::query_y, n * net.output_shape().size());
  if (how.query_weights) batch.weights = out.external(Arg::query_weights, n);
  if (!net.uses_support_stats()) return batch;
  const Operand both = out.arena((support.examples + n) * in);
  out.step(Op::copy, Vector{support.examples * in}, 1, {both, support.x});
  out.step(Op::copy, Vector{n * in}, 1, {offset(both, support.examples * in), batch.x});
  batch.x = both;
  batch.stat_examples = batch.loss_from = support.examples;
  batch.examples = support.examples + n;
  return batch;
}

}  // namespace

Schedule meta_gradient_schedule(const Program& net, const Adaptation& how) {
  Schedule out;
  const int K = how.inner_steps;
  const int64_t P = net.param_count, outputs = how.query_examples * net.output_shape().size();
  const Vector flat{P};
  const bool keep_tapes = how.stash && !how.first_order;
  const bool keep_gradients = how.rate_grad && (how.stash || how.first_order);
  const auto step_part = [&](Operand vector, int k) { return offset(vector, how.rates_per_step ? k * P : 0); };
  const int64_t rate_size = how.rates_per_step ? K * P : P;

  const Batch support = support_batch(out, net, how.support_examples, how.support_weights);
  const Operand rates = K ? out.external(Arg::rates, rate_size) : Operand{};
  const Operand losses = K ? out.external(Arg::support_losses, K) : Operand{};
  const Operand rate_grad = how.rate_grad && K ? out.external(Arg::rate_grad, rate_size) : Operand{};
  const Operand lambda = out.external(Arg::grad, P);

  // forward: phi[0] .. phi[K]
  std::vector<Operand> phi{out.external(Arg::params, P)}, gradients;
  std::vector<Tape> tapes;
  for (int k = 0; k < K; ++k) {
    const Operand g = out.arena(P);
    Tape tape = gradient(out, net, phi[k], support, offset(losses, k), g);
    if (keep_tapes) tapes.push_back(std::move(tape));
    gradients.push_back(g);
    phi.push_back(inner_step(out, net, phi[k], g, step_part(rates, k), out.arena(P)));
  }

  // the query pass: lambda[K]
  const Batch query = query_batch(out, net, how, support);
  const Tape tape = gradient(out, net, phi[K], query, out.external(Arg::loss, 1), lambda);
  out.step(Op::copy, Vector{outputs}, 1,
           {out.external(Arg::output, outputs), offset(tape.value[net.output], query.loss_from * net.output_shape().size())});

  // the sweep: lambda[K-1] .. lambda[0]
  if (rate_grad) out.step(Op::fill_zero, Vector{rate_size}, 1, {rate_grad});
  for (int k = K - 1; k >= 0; --k) {
    const bool recompute = rate_grad && !keep_gradients;
    const Operand g = recompute ? out.arena(P) : gradients[k];
    Operand hu;
    if (!how.first_order) {
      const Operand u = out.arena(P);
      hu = out.arena(P);
      out.step(Op::scale_by_rate, flat, 1, {u, step_part(rates, k), lambda});
      hvp(out, net, phi[k], u, support, keep_tapes ? &tapes[k] : nullptr, hu, recompute ? g : Operand{});
    }
    if (rate_grad) out.step(Op::rate_grad, flat, 1, {step_part(rate_grad, k), g, lambda});
    if (hu) out.step(Op::adjoint_update, flat, 1, {lambda, hu});
  }
  return out;
}

}  // namespace fastmaml
