// Conjugate gradients on A s = v with A = (1 + damping) I + H / lam (ALGORITHMS section 2.5).
// s, r, p, v, hp [P]   state [r.r, v.v, active, steps taken, negative curvature]   history [1]: |r| / |v| after this op
// settings [lam, damping, stop]. An inactive task's vectors no longer change.
#include <cmath>

#include "reference/reference.h"

namespace fastmaml::reference {

namespace {

// The relative error of A s = v; 0 for v = 0.
double relative_residual(const Real& state) { return state[1] == 0 ? 0 : std::sqrt(state[0]) / std::sqrt(state[1]); }

}  // namespace

// s = 0,  r = p = v
void cg_start(const Call& call) {
  const int64_t size = call.shape<Vector>().size;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real s = real(call, 0, task), r = real(call, 1, task), p = real(call, 2, task);
    const Real state = real(call, 3, task), history = real(call, 4, task), v = real(call, 5, task);
    double vv = 0;
    for (int64_t i = 0; i < size; ++i) {
      s[i] = 0;
      r[i] = p[i] = v[i];
      vv += v[i] * v[i];
    }
    state[0] = state[1] = vv;
    state[2] = vv == 0 ? 0 : 1;  // a NaN stays active and reaches s
    state[3] = state[4] = 0;
    history[0] = relative_residual(state);
  }
}

// alpha = r.r / p.Ap,  s += alpha p,  r' = r - alpha Ap,  p = r' + (r'.r' / r.r) p.
// Ends where p.Ap <= 0 (A is not positive definite along p; s stays) or where r.r < stop.
void cg_step(const Call& call) {
  const int64_t size = call.shape<Vector>().size;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real s = real(call, 0, task), r = real(call, 1, task), p = real(call, 2, task);
    const Real state = real(call, 3, task), history = real(call, 4, task), hp = real(call, 5, task), settings = real(call, 6, task);
    history[0] = relative_residual(state);
    if (state[2] == 0) continue;
    const double lam = settings[0], damping = settings[1], stop = settings[2], rr = state[0];
    auto Ap = [&](int64_t i) { return (1 + damping) * p[i] + hp[i] / lam; };

    double pAp = 0;
    for (int64_t i = 0; i < size; ++i) pAp += p[i] * Ap(i);
    if (pAp <= 0) {
      state[2] = 0;
      state[4] = 1;
      continue;
    }
    const double alpha = rr / pAp;
    double rr_next = 0;
    for (int64_t i = 0; i < size; ++i) {
      s[i] += alpha * p[i];
      r[i] -= alpha * Ap(i);
      rr_next += r[i] * r[i];
    }
    for (int64_t i = 0; i < size; ++i) p[i] = r[i] + rr_next / rr * p[i];
    state[0] = rr_next;
    state[2] = rr_next < stop || rr_next == 0 ? 0 : 1;
    state[3] += 1;
    history[0] = relative_residual(state);
  }
}

}  // namespace fastmaml::reference
