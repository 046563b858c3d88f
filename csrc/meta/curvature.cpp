// Products with a task's Hessian or Gauss-Newton matrix at fixed parameters. The first part does not depend on the
// direction and runs once.
//   hessian        first: the gradient pass    second: its tangent
//   gauss_newton   first: the forward pass     second: its tangent, then the backward pass from the loss's Hessian by the outputs
#include "meta/meta.h"

namespace fastmaml {

SplitSchedule curvature_schedules(const Program& net, int64_t examples, bool weights, Curvature curvature) {
  Schedule out;
  const int64_t P = net.param_count;
  const Operand params = out.external(Arg::params, P), u = out.external(Arg::params_dot, P), hu = out.external(Arg::grad_dot, P);
  const Batch support = support_batch(out, net, examples, weights);
  if (curvature == Curvature::gauss_newton) {
    const Tape tape = values(out, net, params, support);
    const size_t shared = out.steps.size();
    gauss_newton(out, net, tape, u, support, hu);
    return split(out, shared);
  }
  const Tape tape = gradient(out, net, params, support, out.arena(1), out.arena(P));
  const size_t shared = out.steps.size();
  hvp(out, net, params, u, support, &tape, hu, {});
  return split(out, shared);
}

}  // namespace fastmaml
