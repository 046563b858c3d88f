// How one task learns, as plain data: the update rule, its gradients' clipping and decay, and the steps with a query loss.
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

  std::string text;  // the text that parse() read; plans are cached by it
  int steps = 0;     // K
  Rule rule = Rule::sgd;
  double momentum = 0, dampening = 0;  // sgd
  bool nesterov = false;
  double beta1 = 0.9, beta2 = 0.999, eps = 1e-8;  // adam
  bool decoupled = false;                         // AdamW
  double weight_decay = 0;
  double clip_value = 0, clip_norm = 0;  // limits for each step's gradient, applied before the decay; 0: not clipped
  int order = 0;                         // the last `order` steps keep their Hessian term; 0: first order
  int64_t minibatch = 0;                 // rows of a step; 0: every step sees all rows
  std::vector<int> queries;              // the query loss is taken at these phi[k], ascending; the last is phi[K]
  std::vector<int> rows;                 // parameters that Arg::step_rows sets anew for each step
  bool proximal = false;                 // + lam (phi - theta)
  bool per_task = false;                 // gradients are not reduced over tasks
  bool rate_grad = false;

  // Plain descent: phi - rate g, without changes to g and without the rates' gradient.
  bool plain() const { return rule == Rule::sgd && momentum == 0 && weight_decay == 0 && !clips() && !proximal && !rate_grad; }
  bool clips() const { return clip_value > 0 || clip_norm > 0; }
  bool has_hessian(int k) const { return k >= steps - order; }
  // The first step of the adjoint sweep. First-order MAML drops the Hessian terms and keeps the rest.
  int first_swept() const { return order == 0 ? 0 : steps - order; }
  int states() const;  // vectors that the rule carries from step to step
  bool is_query(int k) const;

  // Reads words "key=value" between blanks, in any order; only steps= is required.
  // Throws std::invalid_argument with one sentence that quotes the wrong word.
  static InnerLoop parse(const std::string& text);
};

}  // namespace fastmaml
