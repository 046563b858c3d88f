// The four passes of a Program, written as Steps: forward, backward, and the tangent of each (forward-over-reverse).
// A Tape remembers which slots a pass produced, so that later passes can read them; the slots' live ranges follow from that.
#pragma once

#include <vector>

#include "program/program.h"
#include "program/schedule.h"

namespace fastmaml {

// What one walk through the network's nodes leaves behind, by value (value, dot, d, d_dot) or by node (saved, saved_dot).
struct Tape {
  int64_t examples = 0, stat_examples = 0;
  Operand params, params_dot;  // [P]
  std::vector<Operand> value;  // activations
  std::vector<Operand> dot;    // their tangents; absent: zero
  std::vector<Operand> d;      // gradients by the activations; absent: not needed
  std::vector<Operand> d_dot;  // tangents of those
  std::vector<Operand> saved;  // statistics or argmax
  std::vector<Operand> saved_dot;
  std::vector<Operand> tap, winner, winner_dot;  // norm_pool_act's
  std::vector<Operand> saved_grad;               // batch norm's dgamma, dbeta (2 C), kept for the tangent pass
};

enum class Pass { primal, tangent, dual };  // dual: value and tangent side by side, one step where a fused one exists

// Fills tape.value (primal, dual) and tape.dot (tangent, dual) from tape.params / params_dot and the input.
void forward(Schedule& out, const Program& net, Tape& tape, Pass pass, Operand x, Operand x_dot = {}, Operand buffers = {});

// From the gradient by the output to the gradient by the parameters, [P] each; `want_input`: also by the input.
// primal: dy -> grad. tangent: dy_dot -> grad_dot, reading tape.d of an earlier primal walk. dual: both; grad may be absent.
void backward(Schedule& out, const Program& net, Tape& tape, Pass pass, Operand dy, Operand dy_dot, Operand grad, Operand grad_dot,
              bool want_input = false);

// What the passes share (forward_pass.cpp, backward_pass.cpp).
inline bool is_primal(Pass pass) { return pass != Pass::tangent; }
inline bool is_tangent(Pass pass) { return pass != Pass::primal; }

inline Operand offset(Operand operand, int64_t elements) {
  if (operand) operand.offset += elements;
  return operand;
}

// A layer's parameter inside a vector over all parameters; absent where the layer or the vector has none.
inline Operand param_of(const Program& net, Operand vector, int param) {
  if (param < 0 || !vector) return {};
  return offset(vector, net.params[param].offset);
}

}  // namespace fastmaml
