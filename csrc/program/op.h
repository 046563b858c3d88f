// The vocabulary of ops, one row each. What knows all ops is made from this list.
//   name
//   outputs   how many operands it writes, the first ones
//   in_place  where it reads some of those too; else apart
//   work      what it does on paper (program/cost.cpp). Products (linear, conv2d): how often it multiplies the layer's operands; a tangent
//             has two terms, a dual one the value's as well. Other ops: operations for every element of the largest operand, none
//             where numbers only move. has(i) is 1 where operand i is there, else 0.
//   roles     of its operands, outputs first. A role in [brackets] may be absent (a null View): an absent tangent is zero, an absent
//             gain is one, an absent weight is 1/N.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmaml {

// Letters: N examples, C channels, H W image, F filters, P parameters, G groups. Images are stored [N, H, W, C], vectors [N, D].
// Weights: linear [in, out] or, with Linear::out_in, [out, in]; conv2d [KH, KW, C, F] (program/param_layout.h moves parameters from and to
// torch's order).
// `x_dot` is the tangent of x, `dx` the gradient of the loss by x, `dx_dot` the tangent of that gradient (ALGORITHMS section 6).
// An op whose name ends in _jvp computes the tangent of the op before it; _dual computes value and tangent in one pass.
#define FASTMAML_OPS(X)                                                                                                                    \
  /* plain vectors */                                                                                                                      \
  X(fill_zero, 1, apart, 0, "out")                                                                                                         \
  X(copy, 1, apart, 0, "out x")                                                                                                            \
  X(add, 1, apart, 1, "out a b")         /* out may be a */                                                                                \
  X(axpy, 1, in_place, 2, "y [alpha] x") /* y += factor alpha x, alpha is one number, absent: one */                                       \
  /* linear: y = x w + b, rectified where the layer says so: then its tangent takes [y], whose sign tells what was rectified */            \
  /* data gradients take [x] where that comes out of a rectifier: then dx is the gradient by what went into it */                          \
  X(linear_fwd, 1, apart, 1, "y x w [b]")                                                                                                  \
  X(linear_fwd_jvp, 1, apart, 1 + has(2), "y_dot x [x_dot] w w_dot [b_dot] [y]")                                                           \
  X(linear_fwd_dual, 2, apart, 2 + has(3), "y y_dot x [x_dot] w w_dot [b] [b_dot]")                                                        \
  X(linear_bwd_data, 1, apart, 1, "dx dy w [x]")                                                                                           \
  X(linear_bwd_data_jvp, 1, apart, 2, "dx_dot dy dy_dot w w_dot [x]")                                                                      \
  X(linear_bwd_data_dual, 2, apart, 3, "dx dx_dot dy dy_dot w w_dot [x]")                                                                  \
  X(linear_bwd_weight, 2, apart, 1, "dw [db] x dy")                                                                                        \
  X(linear_bwd_weight_jvp, 2, apart, 1 + has(3), "dw_dot [db_dot] x [x_dot] dy dy_dot")                                                    \
  X(linear_update, 2, apart, 1, "w_next [b_next] x dy w [b] rate") /* w_next = w - rate dw: uniform_update of linear_bwd_weight */         \
  X(linear_adjoint, 2, in_place, 1 + has(3), "w_adj [b_adj] x [x_dot] dy dy_dot rate") /* w_adj -= rate dw_dot */                          \
  /* conv2d: the same roles */                                                                                                             \
  X(conv2d_fwd, 1, apart, 1, "y x w [b]")                                                                                                  \
  X(conv2d_fwd_jvp, 1, apart, 1 + has(2), "y_dot x [x_dot] w w_dot [b_dot] [y]")                                                           \
  X(conv2d_fwd_dual, 2, apart, 2 + has(3), "y y_dot x [x_dot] w w_dot [b] [b_dot]")                                                        \
  X(conv2d_bwd_data, 1, apart, 1, "dx dy w [x]")                                                                                           \
  X(conv2d_bwd_data_jvp, 1, apart, 2, "dx_dot dy dy_dot w w_dot [x]")                                                                      \
  X(conv2d_bwd_data_dual, 2, apart, 3, "dx dx_dot dy dy_dot w w_dot [x]")                                                                  \
  X(conv2d_bwd_weight, 2, apart, 1, "dw [db] x dy")                                                                                        \
  X(conv2d_bwd_weight_jvp, 2, apart, 1 + has(3), "dw_dot [db_dot] x [x_dot] dy dy_dot")                                                    \
  /* batch norm over the first stat_examples: stats [3, C] = mean, 1/std, the mean's rounding error (a backend may leave it); */           \
  /* stats_dot [2, C] = mean(x_dot), mean(xhat x_dot) */                                                                                   \
  X(batch_norm_stats, 1, apart, 4, "stats x")                                                                                              \
  X(batch_norm_frozen_stats, 1, apart, 0, "stats mean var")                                                                                \
  X(batch_norm_stats_jvp, 1, apart, 4, "stats_dot x x_dot stats")                                                                          \
  X(batch_norm_fwd, 1, apart, 4, "y x stats [gamma] [beta]")                                                                               \
  X(batch_norm_fwd_jvp, 1, apart, 8, "y_dot x [x_dot] stats [stats_dot] [gamma] [gamma_dot] [beta_dot]")                                   \
  X(batch_norm_bwd_weight, 2, apart, 4, "dgamma dbeta x dy stats")                                                                         \
  X(batch_norm_bwd_weight_jvp, 2, apart, 8, "dgamma_dot dbeta_dot x [x_dot] dy dy_dot stats [stats_dot]")                                  \
  X(batch_norm_bwd_data, 1, apart, 5, "dx x dy stats [gamma] dgamma dbeta")                                                                \
  X(batch_norm_bwd_data_jvp, 1, apart, 12,                                                                                                 \
    "dx_dot x [x_dot] dy dy_dot stats [stats_dot] [gamma] [gamma_dot] dgamma dbeta dgamma_dot dbeta_dot")                                  \
  /* group norm (and layer norm): stats = [mean, 1/std] of [N, G, 2], stats_dot = [mean(x_dot), mean(xhat x_dot)] */                       \
  /* y may be rectified as linear's; the backward pass takes [y] where dy is the gradient behind the rectifier */                          \
  X(group_norm_fwd, 2, apart, 9, "y stats x [gamma] [beta]")                                                                               \
  X(group_norm_fwd_jvp, 2, apart, 18, "y_dot stats_dot x [x_dot] stats [gamma] [gamma_dot] [beta_dot] [y]")                                \
  X(group_norm_bwd, 3, apart, 9, "[dx] dgamma dbeta x dy stats [gamma] [y]")                                                               \
  X(group_norm_bwd_jvp, 3, apart, 18, "[dx_dot] dgamma_dot dbeta_dot x [x_dot] dy dy_dot stats [stats_dot] [gamma] [gamma_dot] [y]")       \
  /* pointwise functions (program/pointwise.h) */                                                                                          \
  X(pointwise_fwd, 1, apart, 1, "y x")                                                                                                     \
  X(pointwise_fwd_jvp, 1, apart, 2, "y_dot x x_dot")                                                                                       \
  X(pointwise_bwd, 1, apart, 2, "dx x dy")                                                                                                 \
  X(pointwise_bwd_jvp, 1, apart, 4, "dx_dot x [x_dot] dy dy_dot")                                                                          \
  X(pointwise_fwd_dual, 2, apart, 3, "y y_dot x x_dot")                                                                                    \
  X(pointwise_bwd_dual, 2, apart, 5, "dx dx_dot x [x_dot] dy dy_dot")                                                                      \
  /* pooling and flatten are linear given the primal argmax: their backward serves tangents too */                                         \
  X(max_pool2d_fwd, 2, apart, 1, "y index x")                                                                                              \
  X(max_pool2d_fwd_jvp, 1, apart, 0, "y_dot x_dot index")                                                                                  \
  X(max_pool2d_bwd, 1, apart, 0, "dx dy index")                                                                                            \
  X(avg_pool2d_fwd, 1, apart, 1, "y x")                                                                                                    \
  X(avg_pool2d_bwd, 1, apart, 1, "dx dy")                                                                                                  \
  X(flatten_fwd, 1, apart, 0, "y x")                                                                                                       \
  X(flatten_bwd, 1, apart, 0, "dx dy")                                                                                                     \
  /* batch norm, max-pool and activation in one (NormPoolAct). winner [N, OH, OW, C]: the x of each window's winning pixel; */             \
  /* tap: its number kh KW + kw, or ~ of that where the activation's argument is not positive. Without a pool: tap is absent, */           \
  /* winner is x */                                                                                                                        \
  X(norm_pool_act_fwd, 3, apart, 4, "y [tap] [winner] x stats [gamma] [beta]")                                                             \
  X(norm_pool_act_fwd_jvp, 2, apart, 8, "y_dot [winner_dot] [tap] winner [x_dot] stats [stats_dot] [gamma] [gamma_dot] [beta] [beta_dot]") \
  X(norm_pool_act_bwd_weight, 2, apart, 4, "dgamma dbeta winner dy stats [gamma] [beta]")                                                  \
  X(norm_pool_act_bwd_weight_jvp, 2, apart, 8, "dgamma_dot dbeta_dot winner [winner_dot] dy dy_dot stats [stats_dot] [gamma] [beta]")      \
  X(norm_pool_act_bwd_data, 1, apart, 5, "dx [tap] x dy stats [gamma] [beta] dgamma dbeta")                                                \
  X(norm_pool_act_bwd_data_jvp, 1, apart, 12,                                                                                              \
    "dx_dot [tap] x [x_dot] dy dy_dot stats [stats_dot] [gamma] [gamma_dot] [beta] dgamma dbeta dgamma_dot dbeta_dot")                     \
  /* losses: the weighted sum over examples and its gradient by the network's output z */                                                  \
  X(cross_entropy, 2, apart, 6, "loss [dz] z labels [weights]")                                                                            \
  X(cross_entropy_jvp, 1, apart, 6, "dz_dot z z_dot labels [weights]")                                                                     \
  X(mse, 2, apart, 6, "loss [dz] z target [weights]")                                                                                      \
  X(mse_jvp, 1, apart, 6, "dz_dot z z_dot target [weights]")                                                                               \
  /* the inner loop and its adjoint */                                                                                                     \
  X(sgd_update, 1, apart, 2, "phi_next phi g rate")     /* phi_next = phi - rate g */                                                      \
  X(uniform_update, 1, apart, 2, "phi_next phi g rate") /* the same with one rate for all */                                               \
  X(scale_by_rate, 1, apart, 1, "u rate lambda")        /* u = rate lambda */                                                              \
  X(rate_grad, 1, in_place, 2, "rate_grad g lambda")    /* rate_grad -= g lambda */                                                        \
  X(adjoint_update, 1, in_place, 1, "lambda hu")        /* lambda -= hu */                                                                 \
  X(sgd_adjoint, 3, in_place, 1 + 2 * has(1) + has(2),                                                                                     \
    "lambda [rate_grad] [u] hu [g] [rate]")      /* rate_grad, adjoint_update and the next scale_by_rate in one */                         \
  X(proximal, 1, in_place, 3, "g lam phi theta") /* g += lam (phi - theta) */                                                              \
  /* clipping of a gradient, by value or by the norm over the entries with mask != 0; u: the adjoint of what comes out */                  \
  X(clip_value, 1, apart, 1, "clipped g")                                                                                                  \
  X(clip_value_adjoint, 1, apart, 1, "u_raw u g")                                                                                          \
  X(clip_norm, 1, apart, 3, "clipped g [mask]")                                                                                            \
  X(clip_norm_adjoint, 1, apart, 5, "u_raw u g [mask]")                                                                                    \
  /* b: the running average of gradients, p: less its adjoint; d: what the rate multiplies (b, or with nesterov g + momentum b) */         \
  X(momentum_update, 3, apart, 5, "phi_next b_next [d] phi g rate [b]")                                                                    \
  X(momentum_adjoint, 2, in_place, 5, "u p rate lambda") /* p in place */                                                                  \
  /* m, s: the running averages of g and g^2, after the step in the adjoint; p, r: less their adjoints */                                  \
  X(adam_update, 3, apart, 12, "phi_next m_next s_next phi g rate [m] [s] [step_count]")                                                   \
  X(adam_adjoint, 5, in_place, 24, "u lambda p r [rate_grad] [phi] g rate m s") /* lambda, p, r, rate_grad in place */                     \
  /* conjugate gradients on ((1 + damping) I + H / lam) s = v; settings = [lam, damping, stop], history = |r| / |v|, */                    \
  /* state = [r.r, v.v, active, steps taken, negative curvature] */                                                                        \
  X(cg_start, 5, apart, 2, "s r p state history v")                                                                                        \
  X(cg_step, 5, in_place, 12, "s r p state history hp settings")

// Ops of a loss written in Python, which no backend fills: a walk hands them to Run::python_loss (ops/ops.h), for all tasks at once.
#define FASTMAML_CALLER_OPS(X)             \
  X(caller_loss, 2, apart, 0, "loss dz z") \
  X(caller_loss_jvp, 1, apart, 0, "dz_dot z z_dot")

#define FASTMAML_ALL_OPS(X) FASTMAML_OPS(X) FASTMAML_CALLER_OPS(X)

enum class Op : uint8_t {
#define X(name, ...) name,
  FASTMAML_ALL_OPS(X)
#undef X
};

inline constexpr int kOps = 0
#define X(...) +1
    FASTMAML_ALL_OPS(X)
#undef X
    ;
inline constexpr int kMaxOperands = 15;

constexpr bool is_python_loss(Op op) {
  return false
#define X(name, ...) || op == Op::name
      FASTMAML_CALLER_OPS(X)
#undef X
          ;
}

const char* op_name(Op op);
const char* op_roles(Op op);
size_t op_outputs(Op op);
bool op_in_place(Op op);

}  // namespace fastmaml
