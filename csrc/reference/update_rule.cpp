// SGD with momentum (PyTorch's semantics), Adam and AdamW, and their adjoints (ALGORITHMS sections 1.3 and 1.4).     all [P]
// u, p and r are MINUS the adjoints of g, of b or m, and of s. The sweep then subtracts, as for plain gradient descent.
#include <cmath>

#include "reference/reference.h"

namespace fastmaml::reference {

// b_next = momentum b + (1 - dampening) g, or g in the first step;  d = b_next, or g + momentum b_next;  phi_next = phi - rate d
void momentum_update(const Call& call) {
  const Momentum& rule = call.shape<Momentum>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real phi_next = real(call, 0, task), b_next = real(call, 1, task), direction = real(call, 2, task);
    const Real phi = real(call, 3, task), g = real(call, 4, task), rate = real(call, 5, task), b = real(call, 6, task);
    for (int64_t i = 0; i < rule.size; ++i) {
      const double average = rule.first ? g[i] : rule.momentum * b[i] + (1 - rule.dampening) * g[i];
      const double d = rule.nesterov ? g[i] + rule.momentum * average : average;
      phi_next[i] = phi[i] - rate[i] * d;
      b_next[i] = average;
      if (direction) direction[i] = d;
    }
  }
}

// With v = rate lambda:  p += v (nesterov: momentum v);  u = (1 - dampening) p, or p in the first step (nesterov: + v);  p *= momentum
void momentum_adjoint(const Call& call) {
  const Momentum& rule = call.shape<Momentum>();
  const double share = rule.first ? 1 : 1 - rule.dampening;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real u = real(call, 0, task), p = real(call, 1, task), rate = real(call, 2, task), lambda = real(call, 3, task);
    for (int64_t i = 0; i < rule.size; ++i) {
      const double v = rate[i] * lambda[i];
      p[i] += rule.nesterov ? rule.momentum * v : v;
      u[i] = share * p[i] + (rule.nesterov ? v : 0);
      p[i] *= rule.momentum;
    }
  }
}

// m_next = beta1 m + (1 - beta1) g,  s_next = beta2 s + (1 - beta2) g^2,  phi_next = phi - rate (mh / (sqrt(sh) + eps) + decay phi)
// with mh = m_next / (1 - beta1^t), sh = s_next / (1 - beta2^t) in the t-th step.
void adam_update(const Call& call) {
  const Adam& rule = call.shape<Adam>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real phi_next = real(call, 0, task), m_next = real(call, 1, task), s_next = real(call, 2, task);
    const Real phi = real(call, 3, task), g = real(call, 4, task), rate = real(call, 5, task);
    const Real m = real(call, 6, task), s = real(call, 7, task), step_count = real(call, 8, task);
    const double t = static_cast<double>(rule.step + 1) + value_or(step_count, 0, 0.0);
    const double c1 = 1 - std::pow(rule.beta1, t), c2 = 1 - std::pow(rule.beta2, t);
    for (int64_t i = 0; i < rule.size; ++i) {
      const double first = rule.beta1 * value_or(m, i, 0.0) + (1 - rule.beta1) * g[i];
      const double second = rule.beta2 * value_or(s, i, 0.0) + (1 - rule.beta2) * g[i] * g[i];
      phi_next[i] = phi[i] - rate[i] * (first / c1 / (std::sqrt(second / c2) + rule.eps) + rule.decay * phi[i]);
      m_next[i] = first;
      s_next[i] = second;
    }
  }
}

// With v = rate lambda, D = sqrt(sh) + eps:
//   rate_grad -= (mh / D + decay phi) lambda;  p += v / (c1 D);  r -= v mh / (2 sqrt(sh) D^2 c2), unchanged where sh is 0;
//   u = (1 - beta1) p + (1 - beta2) 2 g r;  lambda -= decay v;  p *= beta1;  r *= beta2.     phi may be absent if decay is 0
void adam_adjoint(const Call& call) {
  const Adam& rule = call.shape<Adam>();
  const double t = static_cast<double>(rule.step + 1), c1 = 1 - std::pow(rule.beta1, t), c2 = 1 - std::pow(rule.beta2, t);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real u = real(call, 0, task), lambda = real(call, 1, task), p = real(call, 2, task), r = real(call, 3, task);
    const Real rate_grad = real(call, 4, task), phi = real(call, 5, task), g = real(call, 6, task), rate = real(call, 7, task);
    const Real m = real(call, 8, task), s = real(call, 9, task);
    for (int64_t i = 0; i < rule.size; ++i) {
      const double v = rate[i] * lambda[i], mh = m[i] / c1, root = std::sqrt(s[i] / c2), D = root + rule.eps;
      if (rate_grad) rate_grad[i] -= (mh / D + rule.decay * value_or(phi, i, 0.0)) * lambda[i];
      p[i] += v / (c1 * D);
      if (root != 0) r[i] -= v * (mh / root) / D / D / (2 * c2);
      u[i] = (1 - rule.beta1) * p[i] + (1 - rule.beta2) * 2 * g[i] * r[i];
      lambda[i] -= rule.decay * v;
      p[i] *= rule.beta1;
      r[i] *= rule.beta2;
    }
  }
}

}  // namespace fastmaml::reference
