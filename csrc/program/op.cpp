// Names of ops, their operands and the arguments of schedules, for messages and listings.
#include "program/op.h"

#include "program/schedule.h"

namespace fastmaml {

namespace {
constexpr const char* kNames[] = {
#define X(name, roles) #name,
    FASTMAML_OPS(X) FASTMAML_CALLER_OPS(X)
#undef X
};
constexpr const char* kRoles[] = {
#define X(name, roles) roles,
    FASTMAML_OPS(X) FASTMAML_CALLER_OPS(X)
#undef X
};
constexpr const char* kArgNames[] = {"none",
                                     "params",
                                     "params_dot",
                                     "buffers",
                                     "rates",
                                     "support_x",
                                     "support_y",
                                     "support_weights",
                                     "support_x_dot",
                                     "query_x",
                                     "query_y",
                                     "query_weights",
                                     "loss_weights",
                                     "step_rows",
                                     "lam",
                                     "mask",
                                     "state",
                                     "step_count",
                                     "output_grad",
                                     "output_grad_dot",
                                     "cg_settings",
                                     "tape",
                                     "tape_index",
                                     "tape_tap",
                                     "loss",
                                     "grad",
                                     "grad_dot",
                                     "output",
                                     "output_dot",
                                     "input_grad",
                                     "input_grad_dot",
                                     "adapted",
                                     "state_next",
                                     "support_losses",
                                     "query_losses",
                                     "rate_grad",
                                     "step_rows_grad",
                                     "solution",
                                     "cg_state",
                                     "cg_history",
                                     "tape_made",
                                     "tape_index_made",
                                     "tape_tap_made"};
static_assert(sizeof(kArgNames) / sizeof(*kArgNames) == kArgs, "one name per Arg");
}  // namespace

const char* op_name(Op op) { return kNames[static_cast<int>(op)]; }
const char* op_roles(Op op) { return kRoles[static_cast<int>(op)]; }
const char* arg_name(Arg arg) { return kArgNames[static_cast<int>(arg)]; }

size_t op_outputs(Op op) {
  switch (op) {
    case Op::linear_fwd_dual:
    case Op::linear_bwd_data_dual:
    case Op::linear_bwd_weight:
    case Op::linear_bwd_weight_jvp:
    case Op::linear_update:
    case Op::linear_adjoint:
    case Op::conv2d_fwd_dual:
    case Op::conv2d_bwd_data_dual:
    case Op::conv2d_bwd_weight:
    case Op::conv2d_bwd_weight_jvp:
    case Op::batch_norm_bwd_weight:
    case Op::batch_norm_bwd_weight_jvp:
    case Op::pointwise_fwd_dual:
    case Op::pointwise_bwd_dual:
    case Op::group_norm_fwd:
    case Op::group_norm_fwd_jvp:
    case Op::max_pool2d_fwd:
    case Op::norm_pool_act_fwd_jvp:
    case Op::norm_pool_act_bwd_weight:
    case Op::norm_pool_act_bwd_weight_jvp:
    case Op::cross_entropy:
    case Op::mse:
    case Op::momentum_adjoint:
    case Op::caller_loss:
      return 2;
    case Op::group_norm_bwd:
    case Op::group_norm_bwd_jvp:
    case Op::norm_pool_act_fwd:
    case Op::sgd_adjoint:
    case Op::momentum_update:
    case Op::adam_update:
      return 3;
    case Op::adam_adjoint:
    case Op::cg_start:
    case Op::cg_step:
      return 5;
    default:
      return 1;
  }
}

bool op_in_place(Op op) {
  switch (op) {
    case Op::linear_adjoint:
    case Op::rate_grad:
    case Op::adjoint_update:
    case Op::sgd_adjoint:
    case Op::cg_step:
    case Op::axpy:
    case Op::proximal:
    case Op::momentum_adjoint:
    case Op::adam_adjoint:
      return true;
    default:
      return false;
  }
}

}  // namespace fastmaml
