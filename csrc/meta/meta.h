// MAML as Schedules: plain data, the same for every backend. Nothing here runs a Schedule or knows a device.
#pragma once

#include "meta/inner_loop.h"
#include "program/passes.h"
#include "program/program.h"
#include "program/schedule.h"

namespace fastmaml {

// An inner loop, the sizes of its inputs, and which optional inputs are given.
struct InnerLoopSpec {
  InnerLoop loop;
  int64_t support_examples = 0, query_examples = 0;
  bool stash = false;           // keep the activations of the inner steps instead of recomputing them in the sweep
  bool rates_per_step = false;  // Arg::rates has a row for each of K steps; false: one row for all steps
  bool uniform_rate = false;    // a row of rates is one number, not P; only for plain descent (InnerLoop::plain)
  // Which optional arguments are given.
  bool support_weights = false, query_weights = false, loss_weights = false, mask = false, state = false, step_count = false;
};

// output = net(params, query_x). In `support` batch-norm mode the statistics come from support_x (support_examples >
// 0).
Schedule forward_schedule(const Program& net, int64_t examples, int64_t support_examples);

// loss, grad = L_S, grad L_S at params
Schedule gradient_schedule(const Program& net, int64_t examples, bool weights);

// output = net(params, support_x), grad = the gradient of <output, output_grad> by the parameters
Schedule vjp_schedule(const Program& net, int64_t examples);

// grad_dot = H_S(params) params_dot
Schedule hvp_schedule(const Program& net, int64_t examples, bool weights);

// Products of the loss's curvature matrix at params with params_dot (curvature.cpp).
enum class Curvature : uint8_t {
  hessian,
  gauss_newton,  // J^T L J: J is the Jacobian of the outputs, L the loss's Hessian by the outputs
};
// first: the work that all products share; second: grad_dot = the product
SplitSchedule curvature_schedules(const Program& net, int64_t examples, bool weights, Curvature curvature);

// adapted = phi[K], support_losses = L_S(phi[0..K-1]), state_next = the update rule's state after the last step
Schedule adapt_schedule(const Program& net, const InnerLoopSpec& spec);

// The whole meta-gradient of one task; see meta_gradient.cpp.
Schedule meta_gradient_schedule(const Program& net, const InnerLoopSpec& spec);

// solution s of ((1 + damping) I + H_S(params) / lam) s = params_dot; masked: H has rows and columns where mask != 0 only
Schedule conjugate_gradient_schedule(const Program& net, int64_t examples, bool weights, bool masked, int steps);

// The four passes of the network without a loss, from given gradients by the output. For tests and for losses written
// in Python.
Schedule passes_schedule(const Program& net, int64_t examples, bool dual);

// Pieces that several schedules share (gradient.cpp).
struct Batch {  // a task's examples, as the loss sees them
  Operand x, y, weights;
  int64_t examples = 0;       // rows of x
  int64_t stat_examples = 0;  // rows that give batch norm its statistics
  int64_t loss_from = 0;      // the loss sees rows loss_from .. examples - 1
  bool query = false;         // support or query set; a loss written in Python is told this and the first row
  int64_t first_row = 0;
};
Batch support_batch(Schedule& out, const Program& net, int64_t examples, bool weights);
// In `support` batch-norm mode the support images come before the query images and give the statistics.
Batch query_batch(Schedule& out, const Program& net, const InnerLoopSpec& spec, const Batch& support);
Batch step_batch(const Program& net, const InnerLoopSpec& spec, const Batch& support, int k);  // the rows of inner step k
Tape gradient(Schedule& out, const Program& net, Operand params, const Batch& batch, Operand loss, Operand grad);
// hu = H(params) u. With a tape of the gradient at params, only the tangents are computed.
// Without a tape, a dual pass computes the gradient again together with the tangents; `grad` receives it if given.
void hvp(Schedule& out, const Program& net, Operand params, Operand u, const Batch& batch, const Tape* stashed, Operand hu, Operand grad);
// A tape of the forward pass, and hu = J^T L J u from such a tape.
Tape values(Schedule& out, const Program& net, Operand params, const Batch& batch);
void gauss_newton(Schedule& out, const Program& net, Tape tape, Operand u, const Batch& batch, Operand hu);

}  // namespace fastmaml
