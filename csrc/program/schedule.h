// A Schedule is work as plain data: Steps (an op, its sizes, its operands) over Slots. It runs nothing and knows no backend.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "program/layers.h"
#include "program/op.h"

namespace fastmaml {

// What the caller hands in or receives. Shapes per task; the caller says with a View's task_stride whether tasks share it.
enum class Arg : uint8_t {
  none,
  params,           // [P]
  params_dot,       // [P]        hvp's v; passes: tangent of the parameters
  buffers,          // [B]        running statistics of frozen batch norms
  rates,            // [P] or [K, P]
  support_x,        // [N, input]
  support_y,        // [N] labels or [N, output]
  support_weights,  // [N]
  support_x_dot,    // [N, input]  passes only
  query_x,
  query_y,
  query_weights,
  loss_weights,  // [K + 1]    of the query losses at phi[0] .. phi[K]
  step_rows,     // [K, R]     what some parameters hold in each inner step
  lam,           // [1]        strength of the proximal term
  mask,          // [P]        != 0: this entry counts in clip_norm
  state,         // [S, P]     of the update rule: nothing, b, or m and s
  step_count,    // [1]        inner steps taken before
  output_grad,   // [N, output] passes: gradient by the output
  output_grad_dot,
  cg_settings,  // [lam, damping, stop]
  tape,         // what a split Schedule's first part has left for its second, by type (split.cpp)
  tape_index,
  tape_tap,
  // results
  loss,      // [1]
  grad,      // [P]
  grad_dot,  // [P]
  output,    // [N, output]
  output_dot,
  input_grad,  // [N, input]
  input_grad_dot,
  adapted,         // [P]
  state_next,      // [S, P]
  support_losses,  // [K]
  query_losses,    // [number of queries]
  rate_grad,       // [P] or [K, P]
  step_rows_grad,  // [K, R]
  solution,        // [P]
  cg_state,        // [5]  of conjugate gradients after the last step (program/op.h)
  cg_history,      // [1 + steps]  the residual before the first step and after each
  tape_made,       // the same where it is left
  tape_index_made,
  tape_tap_made,
  count
};
inline constexpr int kArgs = static_cast<int>(Arg::count);
const char* arg_name(Arg arg);

enum class Type : uint8_t { real, index, label, tap };  // float or double; int32; int64; int8

struct Slot {
  int64_t size = 0;  // elements per task
  Type type = Type::real;
  Arg arg = Arg::none;  // none: the slot lives in the arena
};

struct Operand {
  int slot = -1;       // -1: absent
  int64_t offset = 0;  // elements from the slot's start
  explicit operator bool() const { return slot >= 0; }
  bool operator==(const Operand& other) const { return slot == other.slot && offset == other.offset; }
};

// What a Step is part of; for listings and profiles.
enum class Phase : uint8_t { whole, inner_gradient, update, query, sweep };
const char* phase_name(Phase phase);

struct Step {
  Op op;
  int layer = 0;              // index into Schedule::layers
  int64_t examples = 1;       // N
  int64_t stat_examples = 1;  // batch norm: statistics come from the first stat_examples
  std::array<Operand, kMaxOperands> operand{};
  Phase phase = Phase::whole;
};

struct Schedule {
  std::vector<Slot> slots;
  std::vector<Layer> layers;
  std::vector<Step> steps;
  Phase phase = Phase::whole;  // of the Steps that come

  int add_slot(int64_t size, Type type = Type::real);
  Operand arena(int64_t size, Type type = Type::real) { return {add_slot(size, type), 0}; }
  Operand external(Arg arg, int64_t size, Type type = Type::real);  // one slot per Arg; the largest size wins
  int add_layer(const Layer& layer);
  void step(Op op, const Layer& layer, int64_t examples, std::initializer_list<Operand> operands, int64_t stat_examples = 0);
};

// A Schedule as two that run one after the other, the second as often as one likes. What the Steps before `at` leave for the others passes
// through the arguments tape*_made of the first and tape* of the second (split.cpp).
struct SplitSchedule {
  Schedule first, second;
};
SplitSchedule split(const Schedule& whole, size_t at);

std::string to_string(const Schedule& schedule);  // one line per Step, for reading and for tests

}  // namespace fastmaml
