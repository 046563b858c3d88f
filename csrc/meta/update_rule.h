// One inner step's update and its adjoint as Steps (ALGORITHMS sections 1.1 to 1.4). All vectors are [P].
//
//   forward   g = grad L(phi)  ->  clipped  ->  + weight_decay phi, + lam (phi - theta)  ->  the rule's direction d  ->  phi - rate d
//   sweep     back from lambda = the gradient by phi[k+1] to the direction of step k's Hessian product, which lambda is less of.
//             u is LESS the gradient by what entered the rule: then everything subtracts, and plain descent has u = rate lambda.
//             Where all parameters have one rate, H (rate lambda) = rate (H lambda): lambda itself is the direction.
//
// A step's vectors stay alive as far as the sweep asks for them; csrc/README.md says what that costs a step.
#pragma once

#include <vector>

#include "meta/meta.h"

namespace fastmaml {

class UpdateRule {
 public:
  UpdateRule(Schedule& out, const Program& net, const InnerLoopSpec& spec, Operand theta);

  void step(int k, Operand phi, Operand g, Operand phi_next);  // g may be overwritten
  void deliver_state();                                        // into Arg::state_next, behind the last step

  // The sweep, in this order. `before_hessian` leaves the direction for hvp, absent where step k has no Hessian term.
  void start_sweep();
  Operand before_hessian(int k, Operand lambda);
  Operand gradient_again(int k) const;  // where hvp is to write g, absent where nobody asks for it
  void after_hessian(int k, Operand lambda, Operand hu);
  void finish_sweep(Operand lambda);

 private:
  struct Trace {          // of one step
    Operand phi, raw, g;  // the gradient as it came and as it entered the rule, often one slot
    Operand direction;    // momentum: d
    Operand m, s;         // adam: behind the step
    Operand u;            // in the sweep
  };

  Schedule& out_;
  const InnerLoop& loop_;
  const int64_t size_;  // P
  const bool rates_per_step_, uniform_, has_state_, stash_;
  const Operand theta_;
  Operand rates_, rate_grad_, lam_, mask_, step_count_;
  Operand first_, second_;  // the rule's state: b, or m and s
  std::vector<Trace> traces_;
  Operand p_, r_;     // less the adjoints of the state
  Operand anchor_;    // less the gradient by theta as the proximal term's anchor
  const bool again_;  // plain descent: g for the rates' gradient is computed again in the sweep

  bool own_rate_grad() const;  // the rule's adjoint makes the rates' gradient; else Op::rate_grad does
  bool coupled_decay() const { return loop_.weight_decay > 0 && !loop_.decoupled; }
  Operand of_step(Operand rates, int k) const;
  Layer clip() const;
  Layer momentum(int k) const;
  Layer adam(int k) const;
  Operand entering(Operand g, Operand phi);
  Operand entered(const Trace& trace);
  Operand adjoint(int k, Operand lambda);
};

}  // namespace fastmaml
