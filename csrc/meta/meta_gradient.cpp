// The whole meta-gradient of one task as one flat Schedule (ALGORITHMS sections 1.1 and 1.2; MAML, Finn et al. 2017):
//
//   phi[0] = theta                         phi[k+1]  = phi[k] - a * grad_support(phi[k])
//   lambda[K] = w_K grad_query(phi[K])     lambda[k] = lambda[k+1] - H_support(phi[k]) (a * lambda[k+1]) + w_k grad_query(phi[k])
//
// The meta-gradient is lambda[0]. First-order MAML drops the Hessian terms.
// The rate `a` is per parameter, so lambda is scaled before the Hessian: (diag(a) H)^T v = H (a * v).
// The gradient by the rate is da[k] = -grad_support(phi[k]) * lambda[k+1].
// Other update rules and their adjoints are in update_rule.cpp; an adjoint takes the place of a * lambda.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "meta/meta.h"
#include "meta/step_rows.h"
#include "meta/update_rule.h"

namespace fastmaml {
namespace {

// The query losses at the phi[k] named by the loop: their weighted sum, and the sum of their gradients in lambda.
class QueryLosses {
 public:
  QueryLosses(Schedule& out, const Program& net, const InnerLoopSpec& spec, const Batch& support, Operand lambda)
      : out_(out), net_(net), queries_(spec.loop.queries), lambda_(lambda), loss_(out.external(Arg::loss, 1)) {
    if (queries_.size() > 1 && !spec.loss_weights) throw std::invalid_argument("loss_weights are missing for several query losses");
    batch_ = query_batch(out, net, spec, support);
    if (!spec.loss_weights) return;  // L_query(phi[K]) alone
    weights_ = out.external(Arg::loss_weights, spec.loop.steps + 1);
    losses_ = out.external(Arg::query_losses, int64_t(queries_.size()));
    out.step(Op::fill_zero, Vector{1}, 1, {loss_});
    out.step(Op::fill_zero, Vector{net.param_count}, 1, {lambda});
  }

  // Adds the query loss at phi[k]. Returns the network's output there.
  Operand add(int k, Operand phi) {
    if (!weights_) return output_of(gradient(out_, net_, phi, batch_, loss_, lambda_));
    const auto at = std::lower_bound(queries_.begin(), queries_.end(), k) - queries_.begin();
    const Operand loss = offset(losses_, at), q = out_.arena(net_.param_count), w = offset(weights_, k);
    const Tape tape = gradient(out_, net_, phi, batch_, loss, q);
    out_.step(Op::axpy, Axpy{1, 1}, 1, {loss_, w, loss});
    out_.step(Op::axpy, Axpy{net_.param_count, 1}, 1, {lambda_, w, q});
    return output_of(tape);
  }

 private:
  Schedule& out_;
  const Program& net_;
  const std::vector<int>& queries_;
  const Operand lambda_, loss_;
  Batch batch_;
  Operand weights_, losses_;

  Operand output_of(const Tape& tape) const { return offset(tape.value[net_.output], batch_.loss_from * net_.output_shape().size()); }
};

}  // namespace

Schedule meta_gradient_schedule(const Program& net, const InnerLoopSpec& spec) {
  Schedule out;
  const InnerLoop& loop = spec.loop;
  const int K = loop.steps;
  const int64_t P = net.param_count, outputs = spec.query_examples * net.output_shape().size();
  const Batch support = support_batch(out, net, spec.support_examples, spec.support_weights);
  const Operand losses = K ? out.external(Arg::support_losses, K) : Operand{};
  const Operand lambda = out.external(Arg::grad, P);

  // forward: phi[0] .. phi[K]
  std::vector<Operand> phi{out.external(Arg::params, P)};
  UpdateRule rule(out, net, spec, phi[0]);
  const StepRows rows(out, net, loop);
  std::vector<Tape> tapes(K);
  for (int k = 0; k < K; ++k) {
    out.phase = Phase::inner_gradient;
    if (k > 0) rows.put(k, phi[k]);
    const Operand g = out.arena(P);
    Tape tape = gradient(out, net, phi[k], step_batch(net, spec, support, k), offset(losses, k), g);
    if (spec.stash) tapes[k] = std::move(tape);
    phi.push_back(out.arena(P));
    out.phase = Phase::update;
    rule.step(k, phi[k], g, phi[k + 1]);
  }

  // the query pass makes lambda[K]
  out.phase = Phase::query;
  QueryLosses query(out, net, spec, support, lambda);
  const Operand output = query.add(K, phi[K]);
  out.step(Op::copy, Vector{outputs}, 1, {out.external(Arg::output, outputs), output});

  // the sweep makes lambda[K-1] .. lambda[0]
  out.phase = Phase::sweep;
  const Operand rows_grad = rows.size() && K ? out.external(Arg::step_rows_grad, K * rows.size()) : Operand{};
  if (rows_grad) out.step(Op::fill_zero, Vector{rows.size()}, 1, {rows_grad});  // theta holds row 0, so lambda carries its gradient
  rule.start_sweep();
  for (int k = K - 1; k >= 0; --k) {
    if (k >= loop.first_swept()) {
      const Operand u = rule.before_hessian(k, lambda);
      const Operand hu = u ? out.arena(P) : Operand{};
      if (hu) {
        const Batch batch = step_batch(net, spec, support, k);
        hvp(out, net, phi[k], u, batch, spec.stash ? &tapes[k] : nullptr, hu, rule.gradient_again(k));
      }
      rule.after_hessian(k, lambda, hu);
    }
    if (k > 0 && rows_grad) rows.collect(k, lambda, rows_grad);
    if (!loop.is_query(k)) continue;
    out.phase = Phase::query;
    if (k > 0) rows.put(k - 1, phi[k]);
    query.add(k, phi[k]);
    out.phase = Phase::sweep;
  }
  rule.finish_sweep(lambda);
  return out;
}

}  // namespace fastmaml
