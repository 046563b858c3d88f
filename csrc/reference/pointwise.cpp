// pointwise: y = f(x) for the functions of layers.h.     all [N, size]
#include <cmath>
#include <stdexcept>

#include "reference/reference.h"

namespace fastmaml::reference {

namespace {

struct Jet {
  double f, df, ddf;  // f(x), f'(x), f''(x)
};

Jet evaluate(const Pointwise& function, double x) {
  switch (function.kind) {
    case Pointwise::Kind::relu:
      // "x <= 0", as torch writes it, and not "x > 0": a diverged task's NaN must stay one.
      return x <= 0 ? Jet{0, 0, 0} : Jet{x, 1, 0};
    case Pointwise::Kind::leaky_relu:
      return x > 0 ? Jet{x, 1, 0} : Jet{function.number * x, function.number, 0};
    case Pointwise::Kind::tanh: {
      const double y = std::tanh(x), df = 1 - y * y;
      return {y, df, -2 * y * df};
    }
    case Pointwise::Kind::sigmoid: {
      const double s = 1 / (1 + std::exp(-x)), df = s * (1 - s);
      return {s, df, df * (1 - 2 * s)};
    }
    case Pointwise::Kind::silu: {
      const double s = 1 / (1 + std::exp(-x));
      return {x * s, s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))};
    }
    case Pointwise::Kind::elu: {
      if (!(x <= 0)) return {x, 1, 0};
      const double e = function.number * std::exp(x);
      return {function.number * std::expm1(x), e, x < 0 ? e : 0};  // at 0 torch has f' = alpha and f'' = 0
    }
    case Pointwise::Kind::gelu: {
      const double Phi = 0.5 * std::erfc(-x * M_SQRT1_2), phi = std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI);
      return {x * Phi, Phi + x * phi, phi * (2 - x * x)};
    }
    case Pointwise::Kind::gelu_tanh: {
      const double k = std::sqrt(2 / M_PI), c = 0.044715;
      const double t = std::tanh(k * (x + c * x * x * x)), S = 1 - t * t;
      const double u1 = k * (1 + 3 * c * x * x), u2 = 6 * k * c * x;
      return {0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * S * u1, S * u1 + 0.5 * x * S * (u2 - 2 * t * u1 * u1)};
    }
  }
  throw std::logic_error("not a pointwise function");
}

}  // namespace

// y = f(x)
void pointwise_fwd(const Call& call) {
  const Pointwise& function = call.shape<Pointwise>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), x = real(call, 1, task);
    for (int64_t i = 0; i < call.step.examples * function.size; ++i) y[i] = evaluate(function, x[i]).f;
  }
}

// y' = f'(x) x'
void pointwise_fwd_jvp(const Call& call) {
  const Pointwise& function = call.shape<Pointwise>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y_dot = real(call, 0, task), x = real(call, 1, task), x_dot = real(call, 2, task);
    for (int64_t i = 0; i < call.step.examples * function.size; ++i) y_dot[i] = evaluate(function, x[i]).df * x_dot[i];
  }
}

void pointwise_fwd_dual(const Call& call) {
  const Pointwise& function = call.shape<Pointwise>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), y_dot = real(call, 1, task), x = real(call, 2, task), x_dot = real(call, 3, task);
    for (int64_t i = 0; i < call.step.examples * function.size; ++i) {
      const Jet jet = evaluate(function, x[i]);
      y[i] = jet.f;
      y_dot[i] = jet.df * x_dot[i];
    }
  }
}

// dx = f'(x) dy
void pointwise_bwd(const Call& call) {
  const Pointwise& function = call.shape<Pointwise>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx = real(call, 0, task), x = real(call, 1, task), dy = real(call, 2, task);
    for (int64_t i = 0; i < call.step.examples * function.size; ++i) dx[i] = evaluate(function, x[i]).df * dy[i];
  }
}

// dx' = f'(x) dy' + f''(x) x' dy
void pointwise_bwd_jvp(const Call& call) {
  const Pointwise& function = call.shape<Pointwise>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx_dot = real(call, 0, task), x = real(call, 1, task), x_dot = real(call, 2, task);
    const Real dy = real(call, 3, task), dy_dot = real(call, 4, task);
    for (int64_t i = 0; i < call.step.examples * function.size; ++i) {
      const Jet jet = evaluate(function, x[i]);
      dx_dot[i] = jet.df * dy_dot[i] + jet.ddf * value_or(x_dot, i, 0.0) * dy[i];
    }
  }
}

void pointwise_bwd_dual(const Call& call) {
  const Pointwise& function = call.shape<Pointwise>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx = real(call, 0, task), dx_dot = real(call, 1, task), x = real(call, 2, task), x_dot = real(call, 3, task);
    const Real dy = real(call, 4, task), dy_dot = real(call, 5, task);
    for (int64_t i = 0; i < call.step.examples * function.size; ++i) {
      const Jet jet = evaluate(function, x[i]);
      dx[i] = jet.df * dy[i];
      dx_dot[i] = jet.df * dy_dot[i] + jet.ddf * value_or(x_dot, i, 0.0) * dy[i];
    }
  }
}

}  // namespace fastmaml::reference
