// Runs an op of the float64 reference, and compares what it wrote with finite differences or with known values.
// Part of test_reference.cpp.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "ops/ops.h"

using namespace fastmaml;

namespace {

using Vec = std::vector<double>;  // one operand of one task; empty: absent. Labels and indices are held as doubles too.
using Values = std::vector<Vec>;
using Function = std::function<Values(const Values&)>;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
// Central differences with h = 1e-5: h^2 f''' ~ 1e-10 from the formula, eps / h ~ 1e-11 from rounding; sums of 100s of
// terms.
constexpr double kStep = 1e-5, kDifference = 2e-8;
// Two formulas for the same thing in another order of summation.
constexpr double kRounding = 1e-12;

// ---------------------------------------------------------------- reporting

int passed = 0, failed = 0;

void report(const std::string& name, bool ok, const std::string& detail) {
  std::printf("%s  %s%s%s\n", ok ? "ok  " : "FAIL", name.c_str(), detail.empty() ? "" : "  ", detail.c_str());
  ++(ok ? passed : failed);
}

// |got - want| <= tolerance * (1 + |want|) everywhere; names the worst entry. A NaN on either side fails: an output
// that was not written is one.
void expect_close(const std::string& name, const Values& got, const Values& want, double tolerance) {
  if (got.size() != want.size()) return report(name, false, "another number of results");
  double worst = -1;
  char detail[200] = "";
  for (size_t k = 0; k < want.size(); ++k) {
    if (got[k].size() != want[k].size()) return report(name, false, "result " + std::to_string(k) + " has another size");
    for (size_t i = 0; i < want[k].size(); ++i) {
      double error = got[k][i] == want[k][i] ? 0 : std::fabs(got[k][i] - want[k][i]) / (1 + std::fabs(want[k][i]));
      if (std::isnan(error)) error = kInf;
      if (error <= worst) continue;
      worst = error;
      std::snprintf(detail, sizeof detail, "worst: result %zu [%zu] got %.12g want %.12g error %.1e (allowed %.0e)", k, i, got[k][i],
                    want[k][i], error, tolerance);
    }
  }
  if (worst < 0) return report(name, false, "nothing was compared");
  report(name, worst <= tolerance, detail);
}

// ---------------------------------------------------------------- data

std::mt19937 random_bits(1);

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_bits); }

Vec draw(int64_t size) {
  Vec x(size);
  for (double& v : x) v = uniform(-1.5, 1.5);
  return x;
}

// Values that are at least `gap` from zero and from each other: no mask or argmax flips within a finite difference.
Vec draw_spread(int64_t size, double gap = 0.01) {
  Vec x(size);
  for (int64_t i = 0; i < size; ++i) x[i] = gap * static_cast<double>(i + 1) * (i % 2 ? 1 : -1);
  for (int64_t i = size - 1; i > 0; --i) std::swap(x[i], x[static_cast<int64_t>(uniform(0, 1) * static_cast<double>(i + 1))]);
  return x;
}

Values draw_like(const Values& x) {
  Values out;
  for (const Vec& v : x) out.push_back(draw(static_cast<int64_t>(v.size())));
  return out;
}

// ---------------------------------------------------------------- running an op

// An op with its sizes. Outputs are given as operands of the right size; what they hold is overwritten with NaN first
// (unless `in_place`), so an op that adds to its output or leaves a hole cannot pass.
struct Sized {
  Op op;
  Layer layer;
  int64_t examples = 1;
  int64_t stat_examples = 0;  // 0: all
};

std::vector<std::string> roles(Op op) {
  std::istringstream text(op_roles(op));
  std::vector<std::string> out;
  for (std::string role; text >> role;) out.push_back(role[0] == '[' ? role.substr(1, role.size() - 2) : role);
  return out;
}

size_t element_bytes(const std::string& role) { return role == "index" ? 4 : role == "tap" ? 1 : 8; }

double load(const std::string& role, const std::byte* at) {
  if (role == "tap") {
    int8_t v;
    std::memcpy(&v, at, 1);
    return v;
  }
  if (role == "index") {
    int32_t v;
    std::memcpy(&v, at, 4);
    return v;
  }
  if (role == "labels") {
    int64_t v;
    std::memcpy(&v, at, 8);
    return static_cast<double>(v);
  }
  double v;
  std::memcpy(&v, at, 8);
  return v;
}

void store(const std::string& role, std::byte* at, double value) {
  if (role == "tap") {
    const int8_t v = std::isnan(value) ? 99 : static_cast<int8_t>(value);
    std::memcpy(at, &v, 1);
    return;
  }
  if (role == "index") {
    const int32_t v = std::isnan(value) ? -7 : static_cast<int32_t>(value);
    std::memcpy(at, &v, 4);
    return;
  }
  if (role == "labels") {
    const int64_t v = static_cast<int64_t>(value);
    std::memcpy(at, &v, 8);
    return;
  }
  std::memcpy(at, &value, 8);
}

// operands[task][operand]. Runs all tasks in one Call in the given layout; operands that are `shared` have task_stride
// 0.
void run_tasks(const Sized& what, std::vector<Values>& tasks, int lanes, const std::vector<bool>& shared) {
  const std::vector<std::string> role = roles(what.op);
  const size_t count = tasks[0].size();
  if (count != role.size()) {
    std::printf("%s takes %zu operands, the test gives %zu\n", op_name(what.op), role.size(), count);
    std::exit(1);
  }
  const int64_t T = static_cast<int64_t>(tasks.size()), groups = (T + lanes - 1) / lanes;
  std::vector<std::vector<std::byte>> memory(count);
  std::vector<View> views(count);
  auto address = [&](size_t k, int64_t t, int64_t i) {
    const int64_t size = static_cast<int64_t>(tasks[0][k].size());
    const int64_t at = shared[k] ? i : lanes == 1 ? t * size + i : (t / lanes) * size * lanes + i * lanes + t % lanes;
    return memory[k].data() + static_cast<size_t>(at) * element_bytes(role[k]);
  };
  for (size_t k = 0; k < count; ++k) {
    const size_t size = tasks[0][k].size();
    if (size == 0) continue;
    memory[k].resize(size * element_bytes(role[k]) * static_cast<size_t>(shared[k] ? 1 : lanes == 1 ? T : groups * lanes));
    views[k] = {memory[k].data(), shared[k] ? 0 : static_cast<int64_t>(size), shared[k] ? 1 : lanes};
    for (int64_t t = 0; t < T; ++t)
      for (size_t i = 0; i < size; ++i) store(role[k], address(k, t, static_cast<int64_t>(i)), tasks[t][k][i]);
  }
  const Step step{what.op, 0, what.examples, what.stat_examples ? what.stat_examples : what.examples, {}};
  const OpTable& table = reference_ops();
  table.run[static_cast<int>(what.op)](Call{step, what.layer, views.data(), T, nullptr, 0});
  for (size_t k = 0; k < count; ++k)
    for (int64_t t = 0; t < T; ++t)
      for (size_t i = 0; i < tasks[0][k].size(); ++i) tasks[t][k][i] = load(role[k], address(k, t, static_cast<int64_t>(i)));
}

bool same_bits(const Vec& a, const Vec& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), 8 * a.size()) == 0);
}

// Every (op, sizes) that ran, once, for the layout tests at the end.
struct Recorded {
  Sized what;
  Values before;
};
std::vector<Recorded> recorded;

Values run(const Sized& what, Values operands) {
  auto sizes = [](const Values& v) {
    std::vector<size_t> s;
    for (const Vec& x : v) s.push_back(x.size());
    return s;
  };
  auto kind = [](const Layer& layer) { return std::holds_alternative<Pointwise>(layer) ? int(std::get<Pointwise>(layer).kind) : 0; };
  bool seen = false;
  for (const Recorded& r : recorded)
    seen = seen ||
           (r.what.op == what.op && kind(r.what.layer) == kind(what.layer) && r.what.examples == what.examples &&
            r.what.stat_examples == what.stat_examples && r.what.layer.index() == what.layer.index() && sizes(r.before) == sizes(operands));
  if (!seen) recorded.push_back({what, operands});
  std::vector<Values> tasks{operands};
  run_tasks(what, tasks, 1, std::vector<bool>(operands.size(), false));
  return tasks[0];
}

Vec hole(int64_t size) { return Vec(size, kNaN); }  // an output, to be filled

// ---------------------------------------------------------------- derivatives

Values moved(Values x, const Values& direction, double h) {
  for (size_t k = 0; k < x.size(); ++k)
    for (size_t i = 0; i < x[k].size(); ++i) x[k][i] += h * direction[k][i];
  return x;
}

Values difference(const Function& f, const Values& x, const Values& direction) {
  Values high = f(moved(x, direction, kStep)), low = f(moved(x, direction, -kStep));
  for (size_t k = 0; k < high.size(); ++k)
    for (size_t i = 0; i < high[k].size(); ++i) high[k][i] = (high[k][i] - low[k][i]) / (2 * kStep);
  return high;
}

double inner(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t k = 0; k < a.size(); ++k)
    for (size_t i = 0; i < a[k].size(); ++i) sum += a[k][i] * b[k][i];
  return sum;
}

// A differentiable piece of a network: x (all inputs, parameters too) -> one y.
struct Piece {
  Function forward;                                                         // x -> {y}
  std::function<Values(const Values& x, const Values& x_dot)> forward_jvp;  // -> {y_dot}
  std::function<Values(const Values& x, const Vec& dy)> backward;           // -> gradients, one for each x
  std::function<Values(const Values& x, const Values& x_dot, const Vec& dy, const Vec& dy_dot)> backward_jvp;
};

void check(const std::string& name, const Piece& piece, const Values& x) {
  const Values y = piece.forward(x), x_dot = draw_like(x);
  const Vec dy = draw(static_cast<int64_t>(y[0].size())), dy_dot = draw(static_cast<int64_t>(y[0].size()));

  expect_close(name + ": fwd_jvp is the derivative of fwd", piece.forward_jvp(x, x_dot), difference(piece.forward, x, x_dot), kDifference);

  Values gradient = x;  // entry by entry from fwd alone
  for (size_t k = 0; k < x.size(); ++k)
    for (size_t i = 0; i < x[k].size(); ++i) {
      Values unit;
      for (const Vec& v : x) unit.push_back(Vec(v.size(), 0.0));
      unit[k][i] = 1;
      gradient[k][i] = inner({dy}, difference(piece.forward, x, unit));
    }
  expect_close(name + ": bwd is the gradient of fwd", piece.backward(x, dy), gradient, kDifference);

  Values all = x, all_dot = x_dot;
  all.push_back(dy);
  all_dot.push_back(dy_dot);
  const Function backward = [&](const Values& v) { return piece.backward(Values(v.begin(), v.end() - 1), v.back()); };
  expect_close(name + ": bwd_jvp is the derivative of bwd", piece.backward_jvp(x, x_dot, dy, dy_dot), difference(backward, all, all_dot),
               kDifference);
}

Vec zeros(const Vec& like) { return Vec(like.size(), 0.0); }

}  // namespace
