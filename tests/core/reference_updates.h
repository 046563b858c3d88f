// Plain vectors, the update rules with their adjoints, and conjugate gradients. Part of test_reference.cpp.
#pragma once

#include "reference_checks.h"

namespace {

// ---------------------------------------------------------------- vectors and updates

void test_vectors() {
  const Vec a{1, 2, 3}, b{10, 20, 30}, rate{0.1, 0.2, 0.5};
  const Vector flat{3};
  expect_close("fill_zero, copy, add",
               {run({Op::fill_zero, flat}, {hole(3)})[0], run({Op::copy, flat}, {hole(3), a})[0], run({Op::add, flat}, {hole(3), a, b})[0]},
               {{0, 0, 0}, a, {11, 22, 33}}, 0);
  expect_close("add of rows", {run({Op::add, Add{2}, 2}, {hole(4), {1, 2, 3, 4}, {5, 6, 7, 8}})[0]}, {{6, 8, 10, 12}}, 0);
  expect_close("sgd_update", {run({Op::sgd_update, flat}, {hole(3), a, b, rate})[0]}, {{0, -2, -12}}, kRounding);
  expect_close("uniform_update", {run({Op::uniform_update, flat}, {hole(3), a, b, {0.5}})[0]}, {{-4, -8, -12}}, 0);
  expect_close("scale_by_rate", {run({Op::scale_by_rate, flat}, {hole(3), rate, b})[0]}, {{1, 4, 15}}, kRounding);
  expect_close("rate_grad is in place", {run({Op::rate_grad, flat}, {{100, 100, 100}, a, b})[0]}, {{90, 60, 10}}, 0);
  expect_close("adjoint_update is in place", {run({Op::adjoint_update, flat}, {b, a})[0]}, {{9, 18, 27}}, 0);
  const Values swept = run({Op::sgd_adjoint, flat}, {b, {100, 100, 100}, hole(3), a, a, rate});
  expect_close("sgd_adjoint: lambda and rate_grad in place, u", {swept[0], swept[1], swept[2]},
               {{9, 18, 27}, {90, 60, 10}, {0.9, 3.6, 13.5}}, kRounding);
  expect_close("sgd_adjoint: lambda alone", {run({Op::sgd_adjoint, flat}, {b, {}, {}, a, {}, {}})[0]}, {{9, 18, 27}}, 0);
  expect_close("axpy is in place", {run({Op::axpy, Axpy{3, -2}}, {b, {}, a})[0], run({Op::axpy, Axpy{3, -2}}, {b, {10}, a})[0]},
               {{8, 16, 24}, {-10, -20, -30}}, 0);
  expect_close("proximal is in place", {run({Op::proximal, flat}, {a, {2}, b, {9, 18, 31}})[0]}, {{3, 6, 1}}, 0);
}

// An update by the layer is its gradient and then the update.
void test_linear_updates() {
  const int64_t N = 4, in = 3, out = 2;
  for (const bool out_in : {false, true}) {
    Linear layer{in, out};
    layer.out_in = out_in;
    const Vec x = draw(N * in), x_dot = draw(N * in), dy = draw(N * out), dy_dot = draw(N * out), w = draw(in * out), b = draw(out),
              rate{0.3};
    const auto less = [&](const Vec& from, const Vec& gradient) {
      return run({Op::uniform_update, Vector{int64_t(from.size())}}, {hole(from.size()), from, gradient, rate})[0];
    };
    const std::string name = out_in ? " [out, in]" : " [in, out]";
    const Values grad = run({Op::linear_bwd_weight, layer, N}, {hole(in * out), hole(out), x, dy});
    const Values next = run({Op::linear_update, layer, N}, {hole(in * out), hole(out), x, dy, w, b, rate});
    expect_close("linear_update" + name, {next[0], next[1]}, {less(w, grad[0]), less(b, grad[1])}, 0);
    expect_close("linear_update without b" + name, {run({Op::linear_update, layer, N}, {hole(in * out), {}, x, dy, w, {}, rate})[0]},
                 {less(w, grad[0])}, 0);
    for (const Vec& tangent : {x_dot, Vec{}}) {
      const Values grad_dot = run({Op::linear_bwd_weight_jvp, layer, N}, {hole(in * out), hole(out), x, tangent, dy, dy_dot});
      const Values adjoint = run({Op::linear_adjoint, layer, N}, {w, b, x, tangent, dy, dy_dot, rate});
      expect_close("linear_adjoint is in place" + name, {adjoint[0], adjoint[1]}, {less(w, grad_dot[0]), less(b, grad_dot[1])}, 0);
    }
  }
}

// ---------------------------------------------------------------- clipping and update rules

// The gradient of <along, f(x)>, entry by entry.
Values gradient_of(const Function& f, const Values& x, const Values& along) {
  Values gradient = x;
  for (size_t k = 0; k < x.size(); ++k)
    for (size_t i = 0; i < x[k].size(); ++i) {
      Values unit;
      for (const Vec& v : x) unit.push_back(Vec(v.size(), 0.0));
      unit[k][i] = 1;
      gradient[k][i] = inner(along, difference(f, x, unit));
    }
  return gradient;
}

Vec negative(Vec x) {
  for (double& v : x) v = -v;
  return x;
}

void test_clips() {
  const int64_t P = 6;
  const Vec g = draw_spread(P, 0.3), u = draw(P), mask{1, 0, 1, 1, 0, 1}, none;
  for (const double limit : {0.7, 100.0}) {
    const Clip clip{P, limit};
    const std::string name = " at " + std::to_string(limit);
    const Function by_value = [&](const Values& v) { return Values{run({Op::clip_value, clip}, {hole(P), v[0]})[0]}; };
    expect_close("clip_value_adjoint" + name, {run({Op::clip_value_adjoint, clip}, {hole(P), u, g})[0]}, gradient_of(by_value, {g}, {u}),
                 kDifference);
    for (const Vec& m : {none, mask}) {
      const Function by_norm = [&](const Values& v) { return Values{run({Op::clip_norm, clip}, {hole(P), v[0], m})[0]}; };
      expect_close("clip_norm_adjoint" + name + (m.empty() ? "" : ", masked"), {run({Op::clip_norm_adjoint, clip}, {hole(P), u, g, m})[0]},
                   gradient_of(by_norm, {g}, {u}), kDifference);
    }
  }
  const Vec lost = run({Op::clip_value, Clip{4, 2}}, {hole(4), {-3, 2, kNaN, kInf}})[0];
  expect_close("clip_value by hand", {{lost[0], lost[1], lost[3]}}, {{-2, 2, 2}}, 0);
  report("clip_value: NaN stays", std::isnan(lost[2]), "");
  expect_close("clip_value_adjoint passes the gradient at the limit",
               {run({Op::clip_value_adjoint, Clip{2, 2}}, {hole(2), {5, 7}, {-2, 2.5}})[0]}, {{5, 0}}, 0);
  expect_close("clip_norm by hand", {run({Op::clip_norm, Clip{3, 2}}, {hole(3), {6, 100, 8}, {1, 0, 1}})[0]}, {{1.2, 20, 1.6}}, kRounding);
  expect_close("clip_norm of zero", {run({Op::clip_norm, Clip{2, 2}}, {hole(2), {0, 0}, {}})[0]}, {{0, 0}}, 0);
}

// One step's outputs by (phi, g, rate, state); the op of the adjoint takes and gives LESS the gradients by the state and by g.
void test_momentum() {
  const int64_t P = 5;
  for (const bool nesterov : {false, true})
    for (const bool first : {true, false}) {
      const Momentum rule{P, 0.8, 0.3, nesterov, first};
      const Vec lambda = draw(P), of_b = draw(P), rate = draw(P), none;
      const Values x{draw(P), draw(P), rate, draw(P)};  // phi, g, rate, b
      const Function step = [&](const Values& v) {
        const Values out = run({Op::momentum_update, rule}, {hole(P), hole(P), hole(P), v[0], v[1], v[2], first ? none : v[3]});
        return Values{out[0], out[1]};
      };
      const Values gradient = gradient_of(step, x, {lambda, of_b});
      const Values out = run({Op::momentum_adjoint, rule}, {hole(P), negative(of_b), rate, lambda});
      const std::string name = std::string(nesterov ? "nesterov" : "momentum") + (first ? ", the first step" : "");
      expect_close(name + ": u and p", {out[0], first ? none : out[1]}, {negative(gradient[1]), first ? none : negative(gradient[3])},
                   kDifference);
      const Values again = run({Op::momentum_update, rule}, {hole(P), hole(P), hole(P), x[0], x[1], rate, first ? none : x[3]});
      Vec by_rate = hole(P);
      for (int64_t i = 0; i < P; ++i) by_rate[i] = -again[2][i] * lambda[i];
      expect_close(name + ": d is what the rate multiplies", {by_rate}, {gradient[2]}, kDifference);
    }
  const Momentum rule{1, 0.5, 0.25, true, false};  // b = 0.5 4 + 0.75 8 = 8;  d = 8 + 0.5 8 = 12
  expect_close("momentum_update by hand", run({Op::momentum_update, rule}, {hole(1), hole(1), hole(1), {10}, {8}, {0.5}, {4}}),
               {{4}, {8}, {12}, {10}, {8}, {0.5}, {4}}, 0);
}

void test_adam() {
  const int64_t P = 5;
  for (const double decay : {0.0, 0.1})
    for (const int64_t step : {0, 3}) {
      const Adam rule{P, 0.7, 0.9, 1e-2, decay, step};
      const Vec lambda = draw(P), of_m = draw(P), of_s = draw(P), rate = draw(P), none;
      Vec s = draw(P);
      for (double& v : s) v = 0.1 + v * v;
      const Values x{draw(P), draw(P), rate, draw(P), s};  // phi, g, rate, m, s
      const auto update = [&](const Values& v) {
        return run({Op::adam_update, rule}, {hole(P), hole(P), hole(P), v[0], v[1], v[2], v[3], v[4], none});
      };
      const Function outputs = [&](const Values& v) {
        const Values out = update(v);
        return Values{out[0], out[1], out[2]};
      };
      const Values gradient = gradient_of(outputs, x, {lambda, of_m, of_s}), after = update(x);
      const Values out = run({Op::adam_adjoint, rule},
                             {hole(P), lambda, negative(of_m), negative(of_s), Vec(P, 0.0), x[0], x[1], rate, after[1], after[2]});
      expect_close("adam" + std::string(decay ? "w" : "") + ", step " + std::to_string(step) + ": u, lambda, p, r, rate_grad",
                   {out[0], out[1], out[2], out[3], out[4]},
                   {negative(gradient[1]), gradient[0], negative(gradient[3]), negative(gradient[4]), gradient[2]}, kDifference);
    }
  // Step 2, beta1 = beta2 = 1/2: m = 1 + 2 = 3, mh = 4; s = 2 + 8 = 10, sh = 40/3.
  const Adam rule{1, 0.5, 0.5, 1, 0, 1};
  const double d = 4 / (std::sqrt(40.0 / 3) + 1);
  expect_close("adam_update by hand", run({Op::adam_update, rule}, {hole(1), hole(1), hole(1), {9}, {4}, {0.5}, {2}, {4}, {}}),
               {{9 - 0.5 * d}, {3}, {10}, {9}, {4}, {0.5}, {2}, {4}, {}}, kRounding);
  const Adam earlier{1, 0.5, 0.5, 1, 0, 0};
  expect_close("adam_update counts on from step_count",
               {run({Op::adam_update, earlier}, {hole(1), hole(1), hole(1), {9}, {4}, {0.5}, {2}, {4}, {1}})[0]}, {{9 - 0.5 * d}},
               kRounding);
  // sqrt has no derivative at 0: that path passes nothing on, the one through m does.
  const Values dead = run({Op::adam_adjoint, Adam{1, 0.9, 0.999, 1e-8, 0, 0}}, {hole(1), {1}, {0}, {0}, {0}, {1}, {0}, {0.1}, {0}, {0}});
  expect_close("adam_adjoint at a second moment of zero", {dead[0], dead[3]}, {{0.1 / 1e-8}, {0}}, 1e-9);
}

// ---------------------------------------------------------------- conjugate gradients

struct CgRun {
  Vec s, state, history;
};

// H is [P, P]; `steps` steps on ((1 + damping) I + H / lam) s = v.
CgRun solve(const Vec& H, const Vec& v, double lam, double damping, int steps, double stop = 1e-10) {
  const int64_t P = static_cast<int64_t>(v.size());
  const Vector shape{P};
  Values x = run({Op::cg_start, shape}, {hole(P), hole(P), hole(P), hole(5), hole(1), v});  // s r p state history
  Vec history = x[4];
  for (int k = 0; k < steps; ++k) {
    Vec hp(P, 0.0);
    for (int64_t i = 0; i < P; ++i)
      for (int64_t j = 0; j < P; ++j) hp[i] += H[i * P + j] * x[2][j];
    x = run({Op::cg_step, shape}, {x[0], x[1], x[2], x[3], hole(1), hp, {lam, damping, stop}});
    history.push_back(x[4][0]);
  }
  return {x[0], x[3], history};
}

Vec apply(const Vec& H, const Vec& s, double lam, double damping) {
  Vec out;
  for (size_t i = 0; i < s.size(); ++i) {
    double hs = 0;
    for (size_t j = 0; j < s.size(); ++j) hs += H[i * s.size() + j] * s[j];
    out.push_back((1 + damping) * s[i] + hs / lam);
  }
  return out;
}

void test_conjugate_gradient() {
  const int64_t P = 6;
  const Vec B = draw(P * P), v = draw(P);
  Vec H(P * P, 0.0), negative(P * P, 0.0);  // B^T B, and -10 I
  for (int64_t i = 0; i < P; ++i) {
    negative[i * P + i] = -10;
    for (int64_t j = 0; j < P; ++j)
      for (int64_t k = 0; k < P; ++k) H[i * P + j] += B[k * P + i] * B[k * P + j];
  }
  const CgRun full = solve(H, v, 2, 0.5, static_cast<int>(P));
  expect_close("cg: P steps solve the system", {apply(H, full.s, 2, 0.5)}, {v},
               1e-5);  // the solver stops at |r|^2 < 1e-10
  for (const int steps : {1, 2, 3}) {
    const CgRun part = solve(H, v, 2, 0.5, steps);
    const Vec As = apply(H, part.s, 2, 0.5);
    double rr = 0, vv = 0;
    for (int64_t i = 0; i < P; ++i) {
      rr += (v[i] - As[i]) * (v[i] - As[i]);
      vv += v[i] * v[i];
    }
    expect_close("cg: residual after " + std::to_string(steps) + " steps is |v - A s| / |v|", {{part.history.back()}, {part.state[1]}},
                 {{std::sqrt(rr) / std::sqrt(vv)}, {vv}}, kRounding);
    report("cg: still active after " + std::to_string(steps) + " steps", part.state[2] == 1 && part.state[3] == steps, "");
    expect_close("cg: history of " + std::to_string(steps) + " steps", {part.history},
                 {Vec(full.history.begin(), full.history.begin() + 1 + steps)}, 0);
  }
  const CgRun later = solve(H, v, 2, 0.5, static_cast<int>(P) + 4);
  report("cg: converged and inactive", later.state[2] == 0 && later.state[0] < 1e-10, "");
  const CgRun fixed = solve(H, v, 2, 0.5, static_cast<int>(P) + 8);
  expect_close("cg: an inactive task does not change", {fixed.s, fixed.state}, {later.s, later.state}, 0);
  expect_close("cg: an inactive task repeats its residual", {{fixed.history.back()}}, {{later.history.back()}}, 0);
  const CgRun early = solve(H, v, 2, 0.5, 3, 1e3);  // |v|^2 is less
  expect_close(
      "cg: stops after the step that brings r.r below stop", {early.s, early.state, early.history},
      {solve(H, v, 2, 0.5, 1).s, {early.state[0], early.state[1], 0, 1, 0}, {1, early.history[1], early.history[1], early.history[1]}}, 0);
  // A = -9 I: the first direction has negative curvature, so s stays 0 and the residual 1.
  const CgRun stopped = solve(negative, v, 1, 0, 3);
  expect_close("cg: negative curvature keeps s", {stopped.s, stopped.history, {stopped.state[2], stopped.state[3], stopped.state[4]}},
               {Vec(P, 0.0), {1, 1, 1, 1}, {0, 0, 1}}, 0);
  const CgRun nothing = solve(H, Vec(P, 0.0), 2, 0, 3);
  expect_close("cg: v = 0 gives s = 0 and residual 0", {nothing.s, nothing.history, {nothing.state[2], nothing.state[4]}},
               {Vec(P, 0.0), {0, 0, 0, 0}, {0, 0}}, 0);
  const CgRun one = solve({3}, {4}, 1, 0, 1);  // (1 + 3) s = 4
  expect_close("cg by hand", {one.s, one.state}, {{1}, {0, 16, 0, 1, 0}}, 0);
  // Damping and lam act as (1 + damping) and 1 / lam: (1 + 1) s + 3 / 2 s = 7.
  expect_close("cg by hand, damped", {solve({3}, {7}, 2, 1, 1).s}, {{2}}, 0);
  Vec lost = v;
  lost[0] = kNaN;
  report("cg: a NaN in v reaches the residual", std::isnan(solve(H, lost, 2, 0, 2).history.back()), "");
}

}  // namespace
