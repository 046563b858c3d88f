// How one task is learned, as plain data: the update rule, what is done to its gradients, and where the query loss is taken.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastmaml {

// The update rules: the word behind rule=, and the settings that not all rules take. Momentum is a setting of sgd, AdamW one of adam.
#define FASTMAML_RULES(X)                     \
  X(sgd, "momentum", "dampening", "nesterov") \
  X(adam, "beta1", "beta2", "eps", "decoupled")

struct InnerLoop {
  enum class Rule : uint8_t {
#define X(name, ...) name,
    FASTMAML_RULES(X)
#undef X
  };

  std::string text;  // what it was read from; plans are cached by it
  int steps = 0;     // K
  Rule rule = Rule::sgd;
  double momentum = 0, dampening = 0;  // sgd
  bool nesterov = false;
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;  // adam
  bool decoupled = false;                         // AdamW
  double weight_decay = 0;
  double clip_value = 0, clip_norm = 0;  // of each step's gradient, before the decay; 0: not clipped
  int order = 0;                         // the last `order` steps have their Hessian term; 0: first order
  int64_t minibatch = 0;                 // rows of a step; 0: every step sees all rows
  std::vector<int> queries;              // the query loss is taken at these phi[k], ascending, the last is phi[K]
  std::vector<int> rows;                 // parameters that Arg::step_rows sets anew for each step
  bool proximal = false;                 // + lam (phi - theta)
  bool per_task = false;                 // gradients are not reduced over tasks
  bool rate_grad = false;

  // phi - rate g, with nothing else done to g and nobody asking for the rates' gradient
  bool plain() const { return rule == Rule::sgd && momentum == 0 && weight_decay == 0 && !clips() && !proximal && !rate_grad; }
  bool clips() const { return clip_value > 0 || clip_norm > 0; }
  bool has_hessian(int k) const { return k >= steps - order; }
  // The first step that the adjoint sweep goes back through. First-order MAML drops the Hessian terms and keeps the rest.
  int first_swept() const { return order == 0 ? 0 : steps - order; }
  int states() const;  // vectors that the rule carries on
  bool is_query(int k) const;

  // Words "key=value" between blanks, in any order; only steps= must be there. Throws std::invalid_argument with one sentence that
  // quotes the word that does not fit.
  static InnerLoop parse(const std::string& text);
};

}  // namespace fastmaml
