// The vocabulary: every op's name and the roles of its operands, outputs first.
// A role in [brackets] may be absent (a null View): an absent tangent is zero, an absent gain is one, an absent weight is 1/N.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmaml {

// Letters: N examples, C channels, H W image, F filters, P parameters, G groups. Images are stored [N, H, W, C], vectors [N, D].
// Weights: linear [in, out] or, with Linear::out_in, [out, in]; conv2d [KH, KW, C, F] (program/param_layout.h moves parameters from and to
// torch's order).
// `x_dot` is the tangent of x, `dx` the gradient of the loss by x, `dx_dot` the tangent of that gradient (ALGORITHMS section 6).
// An op whose name ends in _jvp computes the tangent of the op before it; _dual computes value and tangent in one pass.
#define FASTMAML_OPS(X)                                                                                                            \
  /* plain vectors */                                                                                                              \
  X(fill_zero, "out")                                                                                                              \
  X(copy, "out x")                                                                                                                 \
  X(add, "out a b")      /* out may be a                                                            */                             \
  X(axpy, "y [alpha] x") /* y += factor alpha x (in place); alpha is one number, absent: one         */                            \
  /* linear: y = x w + b, rectified where the layer says so: then its tangent takes [y], whose sign tells what was rectified */    \
  /* data gradients take [x] where that comes out of a rectifier: then dx is the gradient by what went into it                  */ \
  X(linear_fwd, "y x w [b]")                                                                                                       \
  X(linear_fwd_jvp, "y_dot x [x_dot] w w_dot [b_dot] [y]")                                                                         \
  X(linear_fwd_dual, "y y_dot x [x_dot] w w_dot [b] [b_dot]")                                                                      \
  X(linear_bwd_data, "dx dy w [x]")                                                                                                \
  X(linear_bwd_data_jvp, "dx_dot dy dy_dot w w_dot [x]")                                                                           \
  X(linear_bwd_data_dual, "dx dx_dot dy dy_dot w w_dot [x]")                                                                       \
  X(linear_bwd_weight, "dw [db] x dy")                                                                                             \
  X(linear_bwd_weight_jvp, "dw_dot [db_dot] x [x_dot] dy dy_dot")                                                                  \
  X(linear_update, "w_next [b_next] x dy w [b] rate")         /* w_next = w - rate dw: uniform_update of linear_bwd_weight  */     \
  X(linear_adjoint, "w_adj [b_adj] x [x_dot] dy dy_dot rate") /* w_adj -= rate dw_dot (in place)                            */     \
  /* conv2d: the same roles */                                                                                                     \
  X(conv2d_fwd, "y x w [b]")                                                                                                       \
  X(conv2d_fwd_jvp, "y_dot x [x_dot] w w_dot [b_dot] [y]")                                                                         \
  X(conv2d_fwd_dual, "y y_dot x [x_dot] w w_dot [b] [b_dot]")                                                                      \
  X(conv2d_bwd_data, "dx dy w [x]")                                                                                                \
  X(conv2d_bwd_data_jvp, "dx_dot dy dy_dot w w_dot [x]")                                                                           \
  X(conv2d_bwd_data_dual, "dx dx_dot dy dy_dot w w_dot [x]")                                                                       \
  X(conv2d_bwd_weight, "dw [db] x dy")                                                                                             \
  X(conv2d_bwd_weight_jvp, "dw_dot [db_dot] x [x_dot] dy dy_dot")                                                                  \
  /* batch norm over the first stat_examples: stats [3, C] = mean, 1/std, the mean's rounding error (a backend may leave it); */   \
  /* stats_dot [2, C] = mean(x_dot), mean(xhat x_dot) */                                                                           \
  X(batch_norm_stats, "stats x")                                                                                                   \
  X(batch_norm_frozen_stats, "stats mean var")                                                                                     \
  X(batch_norm_stats_jvp, "stats_dot x x_dot stats")                                                                               \
  X(batch_norm_fwd, "y x stats [gamma] [beta]")                                                                                    \
  X(batch_norm_fwd_jvp, "y_dot x [x_dot] stats [stats_dot] [gamma] [gamma_dot] [beta_dot]")                                        \
  X(batch_norm_bwd_weight, "dgamma dbeta x dy stats")                                                                              \
  X(batch_norm_bwd_weight_jvp, "dgamma_dot dbeta_dot x [x_dot] dy dy_dot stats [stats_dot]")                                       \
  X(batch_norm_bwd_data, "dx x dy stats [gamma] dgamma dbeta")                                                                     \
  X(batch_norm_bwd_data_jvp, "dx_dot x [x_dot] dy dy_dot stats [stats_dot] [gamma] [gamma_dot] dgamma dbeta dgamma_dot dbeta_dot") \
  /* group norm (and layer norm): stats = [mean, 1/std] of [N, G, 2], stats_dot = [mean(x_dot), mean(xhat x_dot)] */               \
  /* y may be rectified as linear's; the backward pass takes [y] where dy is the gradient behind the rectifier                  */ \
  X(group_norm_fwd, "y stats x [gamma] [beta]")                                                                                    \
  X(group_norm_fwd_jvp, "y_dot stats_dot x [x_dot] stats [gamma] [gamma_dot] [beta_dot] [y]")                                      \
  X(group_norm_bwd, "[dx] dgamma dbeta x dy stats [gamma] [y]")                                                                    \
  X(group_norm_bwd_jvp, "[dx_dot] dgamma_dot dbeta_dot x [x_dot] dy dy_dot stats [stats_dot] [gamma] [gamma_dot] [y]")             \
  /* pointwise functions (layers.h, Pointwise::Kind) */                                                                            \
  X(pointwise_fwd, "y x")                                                                                                          \
  X(pointwise_fwd_jvp, "y_dot x x_dot")                                                                                            \
  X(pointwise_bwd, "dx x dy")                                                                                                      \
  X(pointwise_bwd_jvp, "dx_dot x [x_dot] dy dy_dot")                                                                               \
  X(pointwise_fwd_dual, "y y_dot x x_dot")                                                                                         \
  X(pointwise_bwd_dual, "dx dx_dot x [x_dot] dy dy_dot")                                                                           \
  /* pooling and flatten are linear given the primal argmax: their backward serves tangents too */                                 \
  X(max_pool2d_fwd, "y index x")                                                                                                   \
  X(max_pool2d_fwd_jvp, "y_dot x_dot index")                                                                                       \
  X(max_pool2d_bwd, "dx dy index")                                                                                                 \
  X(avg_pool2d_fwd, "y x")                                                                                                         \
  X(avg_pool2d_bwd, "dx dy")                                                                                                       \
  X(flatten_fwd, "y x")                                                                                                            \
  X(flatten_bwd, "dx dy")                                                                                                          \
  /* batch norm, max-pool and activation in one (NormPoolAct). winner [N, OH, OW, C]: the x of each window's winning pixel;     */ \
  /* tap: its number kh KW + kw, or ~ of that where the activation's argument is not positive. Without a pool: tap is absent,   */ \
  /* winner is x */                                                                                                                \
  X(norm_pool_act_fwd, "y [tap] [winner] x stats [gamma] [beta]")                                                                  \
  X(norm_pool_act_fwd_jvp, "y_dot [winner_dot] [tap] winner [x_dot] stats [stats_dot] [gamma] [gamma_dot] [beta] [beta_dot]")      \
  X(norm_pool_act_bwd_weight, "dgamma dbeta winner dy stats [gamma] [beta]")                                                       \
  X(norm_pool_act_bwd_weight_jvp, "dgamma_dot dbeta_dot winner [winner_dot] dy dy_dot stats [stats_dot] [gamma] [beta]")           \
  X(norm_pool_act_bwd_data, "dx [tap] x dy stats [gamma] [beta] dgamma dbeta")                                                     \
  X(norm_pool_act_bwd_data_jvp,                                                                                                    \
    "dx_dot [tap] x [x_dot] dy dy_dot stats [stats_dot] [gamma] [gamma_dot] [beta] dgamma dbeta dgamma_dot dbeta_dot")             \
  /* losses: the weighted sum over examples and its gradient by the network's output z */                                          \
  X(cross_entropy, "loss [dz] z labels [weights]")                                                                                 \
  X(cross_entropy_jvp, "dz_dot z z_dot labels [weights]")                                                                          \
  X(mse, "loss [dz] z target [weights]")                                                                                           \
  X(mse_jvp, "dz_dot z z_dot target [weights]")                                                                                    \
  /* the inner loop and its adjoint */                                                                                             \
  X(sgd_update, "phi_next phi g rate")                   /* phi_next = phi - rate g                    */                          \
  X(uniform_update, "phi_next phi g rate")               /* the same with one rate for all            */                           \
  X(scale_by_rate, "u rate lambda")                      /* u = rate lambda                            */                          \
  X(rate_grad, "rate_grad g lambda")                     /* rate_grad -= g lambda (in place)           */                          \
  X(adjoint_update, "lambda hu")                         /* lambda -= hu (in place)                    */                          \
  X(sgd_adjoint, "lambda [rate_grad] [u] hu [g] [rate]") /* rate_grad, adjoint_update and the next scale_by_rate in one */         \
  X(proximal, "g lam phi theta")                         /* g += lam (phi - theta) (in place)          */                          \
  /* clipping of a gradient, by value or by the norm over the entries with mask != 0; u: the adjoint of what comes out */          \
  X(clip_value, "clipped g")                                                                                                       \
  X(clip_value_adjoint, "u_raw u g")                                                                                               \
  X(clip_norm, "clipped g [mask]")                                                                                                 \
  X(clip_norm_adjoint, "u_raw u g [mask]")                                                                                         \
  /* b: the running average of gradients, p: less its adjoint; d: what the rate multiplies (b, or with nesterov g + momentum b) */ \
  X(momentum_update, "phi_next b_next [d] phi g rate [b]")                                                                         \
  X(momentum_adjoint, "u p rate lambda") /* p in place */                                                                          \
  /* m, s: the running averages of g and g^2, after the step in the adjoint; p, r: less their adjoints */                          \
  X(adam_update, "phi_next m_next s_next phi g rate [m] [s] [step_count]")                                                         \
  X(adam_adjoint, "u lambda p r [rate_grad] [phi] g rate m s") /* lambda, p, r, rate_grad in place */                              \
  /* conjugate gradients on ((1 + damping) I + H / lam) s = v; settings = [lam, damping, stop], history = |r| / |v|, */            \
  /* state = [r.r, v.v, active, steps taken, negative curvature] */                                                                \
  X(cg_start, "s r p state history v")                                                                                             \
  X(cg_step, "s r p state history hp settings")

// Ops of a loss written in Python, which no backend fills: a walk hands them to Run::python_loss (ops/ops.h), for all tasks at once.
#define FASTMAML_CALLER_OPS(X) \
  X(caller_loss, "loss dz z")  \
  X(caller_loss_jvp, "dz_dot z z_dot")

enum class Op : uint8_t {
#define X(name, roles) name,
  FASTMAML_OPS(X) FASTMAML_CALLER_OPS(X)
#undef X
};

inline constexpr int kOps = 0
#define X(name, roles) +1
    FASTMAML_OPS(X) FASTMAML_CALLER_OPS(X)
#undef X
    ;
inline constexpr int kMaxOperands = 15;

constexpr bool is_python_loss(Op op) { return op == Op::caller_loss || op == Op::caller_loss_jvp; }

const char* op_name(Op op);
const char* op_roles(Op op);
size_t op_outputs(Op op);  // how many operands it writes, the first ones
bool op_in_place(Op op);   // it reads some of them too

}  // namespace fastmaml
