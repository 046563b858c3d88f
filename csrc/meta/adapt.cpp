// adapt: K inner steps on the support set.
#include "meta/meta.h"
#include "meta/step_rows.h"
#include "meta/update_rule.h"

namespace fastmaml {

Schedule adapt_schedule(const Program& net, const InnerLoopSpec& spec) {
  Schedule out;
  const int K = spec.loop.steps;
  const int64_t P = net.param_count;
  Operand phi = out.external(Arg::params, P);
  const Operand adapted = out.external(Arg::adapted, P);
  UpdateRule rule(out, net, spec, phi);
  if (K == 0) {
    out.step(Op::copy, Vector{P}, 1, {adapted, phi});
  } else {
    const Batch support = support_batch(out, net, spec.support_examples, spec.support_weights);
    const Operand losses = out.external(Arg::support_losses, K);
    const StepRows rows(out, net, spec.loop);
    for (int k = 0; k < K; ++k) {
      out.phase = Phase::inner_gradient;
      if (k > 0) rows.put(k, phi);
      const Operand g = out.arena(P);
      gradient(out, net, phi, step_batch(net, spec, support, k), offset(losses, k), g);
      const Operand next = k == K - 1 ? adapted : out.arena(P);
      out.phase = Phase::update;
      rule.step(k, phi, g, next);
      phi = next;
    }
  }
  rule.deliver_state();
  return out;
}

}  // namespace fastmaml
