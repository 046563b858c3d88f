// Names of ops, their operands and the arguments of schedules, for messages and listings.
#include "program/op.h"

#include "program/schedule.h"

namespace fastmaml {

namespace {
struct OpRow {
  const char* name;
  size_t outputs;
  bool reads_outputs;
  const char* roles;
};
constexpr bool in_place = true, apart = false;
constexpr OpRow kRows[] = {
#define X(name, outputs, reads_outputs, work, roles) {#name, outputs, reads_outputs, roles},
    FASTMAML_ALL_OPS(X)
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

const char* op_name(Op op) { return kRows[static_cast<int>(op)].name; }
const char* op_roles(Op op) { return kRows[static_cast<int>(op)].roles; }
size_t op_outputs(Op op) { return kRows[static_cast<int>(op)].outputs; }
bool op_in_place(Op op) { return kRows[static_cast<int>(op)].reads_outputs; }
const char* arg_name(Arg arg) { return kArgNames[static_cast<int>(arg)]; }

}  // namespace fastmaml
