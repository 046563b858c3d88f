// Does the float64 reference agree with finite differences, with values worked out by hand, with itself in every layout?
// g++ -std=c++17 -O1 -Icsrc tests/core/test_reference.cpp csrc/reference/*.cpp csrc/program/op.cpp -o test_reference
#include <cmath>
#include <cstdio>
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

// Task t's data: the recorded operands scaled, but labels, indices and the holes of outputs as they are.
void test_layouts() {
  for (const Recorded& r : recorded) {
    const std::vector<std::string> role = roles(r.what.op);
    bool exact = true, alone = true, share = true;
    for (const int64_t T : {3, 11}) {
      std::vector<Values> tasks;
      for (int64_t t = 0; t < T; ++t) {
        tasks.push_back(r.before);
        for (size_t k = 0; k < role.size(); ++k)
          if (role[k] != "labels" && role[k] != "index" && role[k] != "tap")
            for (double& v : tasks.back()[k]) v *= 1 + 0.1 * static_cast<double>(t);
      }
      const std::vector<bool> none(role.size(), false);
      std::vector<Values> major = tasks, lanes = tasks;
      run_tasks(r.what, major, 1, none);
      run_tasks(r.what, lanes, 8, none);
      for (int64_t t = 0; t < T; ++t) {
        std::vector<Values> one{tasks[t]};
        run_tasks(r.what, one, 1, none);
        for (size_t k = 0; k < role.size(); ++k) {
          exact = exact && same_bits(lanes[t][k], major[t][k]);
          alone = alone && same_bits(one[0][k], major[t][k]);
        }
      }
      // Whatever task 0 did not write is an input and may be shared by all tasks.
      std::vector<bool> input(role.size());
      for (size_t k = 0; k < role.size(); ++k) input[k] = same_bits(tasks[0][k], major[0][k]);
      for (const int layout : {1, 8}) {
        std::vector<Values> shared(T, tasks[0]);
        run_tasks(r.what, shared, layout, input);
        for (int64_t t = 0; t < T; ++t)
          for (size_t k = 0; k < role.size(); ++k) share = share && same_bits(shared[t][k], major[0][k]);
      }
    }
    const std::string name = std::string(op_name(r.what.op)) + " N=" + std::to_string(r.what.examples);
    report(name + ": 3 and 11 tasks in 8 lanes have the bits of task-major ones", exact, "");
    report(name + ": a task's bits do not depend on its batch", alone, "");
    report(name + ": inputs shared by all tasks", share, "");
  }
}

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

// ---------------------------------------------------------------- linear and conv2d

struct ProductOps {
  Op fwd, fwd_jvp, fwd_dual, data, data_jvp, data_dual, weight, weight_jvp;
};
#define PRODUCT_OPS(name)                                                                                                            \
  ProductOps {                                                                                                                       \
    Op::name##_fwd, Op::name##_fwd_jvp, Op::name##_fwd_dual, Op::name##_bwd_data, Op::name##_bwd_data_jvp, Op::name##_bwd_data_dual, \
        Op::name##_bwd_weight, Op::name##_bwd_weight_jvp                                                                             \
  }

// d times the derivative of the rectifier that made y, or whose argument y is; if there is one.
Vec masked(const Rectified& how, const Vec& y, Vec d) {
  for (size_t i = 0; how.on && i < d.size(); ++i)
    if (y[i] <= 0) d[i] *= how.slope;
  return d;
}

// x of x_size, w of w_size, b of b_size -> y of y_size, all for N examples.
void test_product(const std::string& name, const ProductOps& op, const Layer& layer, int64_t N, int64_t x_size, int64_t w_size,
                  int64_t b_size, int64_t y_size) {
  auto one = [&](Op which) { return Sized{which, layer, N}; };
  const Rectified act = rectified_output(layer), before = rectified_input(layer);
  const Vec none;
  Piece piece;
  piece.forward = [&](const Values& v) { return Values{run(one(op.fwd), {hole(y_size), v[0], v[1], v[2]})[0]}; };
  const auto y_of = [&](const Values& v) { return act.on ? piece.forward(v)[0] : none; };
  piece.forward_jvp = [&](const Values& v, const Values& d) {
    return Values{run(one(op.fwd_jvp), {hole(y_size), v[0], d[0], v[1], d[1], d[2], y_of(v)})[0]};
  };
  piece.backward = [&](const Values& v, const Vec& dy_behind) {
    const Vec dy = masked(act, y_of(v), dy_behind);
    const Values data = run(one(op.data), {hole(x_size), dy, v[1], none});
    const Values weight = run(one(op.weight), {hole(w_size), hole(b_size), v[0], dy});
    return Values{data[0], weight[0], weight[1]};
  };
  piece.backward_jvp = [&](const Values& v, const Values& d, const Vec& dy_behind, const Vec& dy_dot_behind) {
    const Vec dy = masked(act, y_of(v), dy_behind), dy_dot = masked(act, y_of(v), dy_dot_behind);
    const Values data = run(one(op.data_jvp), {hole(x_size), dy, dy_dot, v[1], d[1], none});
    const Values weight = run(one(op.weight_jvp), {hole(w_size), hole(b_size), v[0], d[0], dy, dy_dot});
    return Values{data[0], weight[0], weight[1]};
  };
  const Values v{draw(x_size), draw(w_size), draw(b_size)};
  check(name, piece, v);

  const Values d = draw_like(v);
  const Vec dy = draw(y_size), dy_dot = draw(y_size);
  for (const bool x_has_tangent : {true, false}) {
    const Values used{x_has_tangent ? d[0] : none, d[1], d[2]};
    const Values dual = run(one(op.fwd_dual), {hole(y_size), hole(y_size), v[0], used[0], v[1], d[1], v[2], d[2]});
    expect_close(name + ": fwd_dual is fwd and fwd_jvp", {dual[0], dual[1]}, {piece.forward(v)[0], piece.forward_jvp(v, used)[0]}, 0);
  }
  const Vec data = run(one(op.data), {hole(x_size), dy, v[1], none})[0];
  const Vec data_jvp = run(one(op.data_jvp), {hole(x_size), dy, dy_dot, v[1], d[1], none})[0];
  const Values dual = run(one(op.data_dual), {hole(x_size), hole(x_size), dy, dy_dot, v[1], d[1], none});
  expect_close(name + ": bwd_data_dual is bwd_data and bwd_data_jvp", {dual[0], dual[1]}, {data, data_jvp}, 0);
  if (before.on) {
    const Values dual_behind = run(one(op.data_dual), {hole(x_size), hole(x_size), dy, dy_dot, v[1], d[1], v[0]});
    const Vec want = masked(before, v[0], data), want_dot = masked(before, v[0], data_jvp);
    expect_close(name + ": x masks dx",
                 {run(one(op.data), {hole(x_size), dy, v[1], v[0]})[0],
                  run(one(op.data_jvp), {hole(x_size), dy, dy_dot, v[1], d[1], v[0]})[0], dual_behind[0], dual_behind[1]},
                 {want, want_dot, want, want_dot}, 0);
  }

  const Values no_x_dot{zeros(v[0]), d[1], d[2]};
  const auto front = [&](const Vec& behind) { return masked(act, y_of(v), behind); };
  expect_close(name + ": an absent x_dot, b or b_dot is zero",
               {run(one(op.fwd_jvp), {hole(y_size), v[0], none, v[1], d[1], none, y_of(v)})[0],
                run(one(op.fwd), {hole(y_size), v[0], v[1], none})[0],
                run(one(op.weight_jvp), {hole(w_size), none, v[0], none, front(dy), front(dy_dot)})[0],
                run(one(op.weight), {hole(w_size), none, v[0], front(dy)})[0]},
               {piece.forward_jvp(v, {zeros(v[0]), d[1], zeros(v[2])})[0], piece.forward({v[0], v[1], zeros(v[2])})[0],
                piece.backward_jvp(v, no_x_dot, dy, dy_dot)[1], piece.backward(v, dy)[1]},
               0);
}

Conv2d conv_shape(int64_t C, int64_t H, int64_t W, int64_t F, int64_t KH, int64_t KW, int64_t sh, int64_t sw, int64_t ph, int64_t pw) {
  return {C, H, W, F, (H + 2 * ph - KH) / sh + 1, (W + 2 * pw - KW) / sw + 1, KH, KW, sh, sw, ph, pw};
}

Conv2d rectified(Conv2d shape, double slope) {
  shape.y = shape.x = {true, slope};
  return shape;
}

void test_products() {
  for (const Linear shape : {Linear{4, 3}, Linear{1, 5}, Linear{6, 1}})
    for (const int64_t N : {1, 5})
      test_product("linear " + std::to_string(shape.in) + "->" + std::to_string(shape.out) + " N=" + std::to_string(N), PRODUCT_OPS(linear),
                   shape, N, N * shape.in, shape.in * shape.out, shape.out, N * shape.out);
  for (const double slope : {0.0, 0.3})
    test_product("linear, slope " + std::to_string(slope), PRODUCT_OPS(linear), Linear{4, 3, {true, slope}, {true, slope}}, 5, 20, 12, 3,
                 15);
  const Vec y = run({Op::linear_fwd, Linear{2, 3}, 2}, {hole(6), {1, 2, 3, 4}, {1, 0, 2, 0, 1, 3}, {10, 20, 30}})[0];
  expect_close("linear_fwd by hand, w is [in, out]", {y}, {{11, 22, 38, 13, 24, 48}}, 0);
  Linear as_torch{2, 3};
  as_torch.out_in = true;
  const Vec same = run({Op::linear_fwd, as_torch, 2}, {hole(6), {1, 2, 3, 4}, {1, 0, 0, 1, 2, 3}, {10, 20, 30}})[0];
  expect_close("linear_fwd by hand, w is [out, in]", {same}, {y}, 0);
  test_product("linear with w [out, in]", PRODUCT_OPS(linear), as_torch, 5, 10, 6, 3, 15);

  const struct {
    const char* name;
    Conv2d shape;
  } cases[] = {{"3x3 pad 1", conv_shape(2, 4, 5, 3, 3, 3, 1, 1, 1, 1)},
               {"3x3 stride 2 pad 1", conv_shape(2, 5, 4, 2, 3, 3, 2, 2, 1, 1)},
               {"2x3 stride 2,1 pad 0,2", conv_shape(1, 4, 3, 2, 2, 3, 2, 1, 0, 2)},
               {"1x1", conv_shape(3, 2, 2, 2, 1, 1, 1, 1, 0, 0)},
               {"3x3 pad 0, whole image", conv_shape(2, 3, 3, 4, 3, 3, 1, 1, 0, 0)},
               {"5x5 pad 2 on 2x2", conv_shape(1, 2, 2, 2, 5, 5, 1, 1, 2, 2)},
               {"3x3 stride 2 pad 1, ReLU", rectified(conv_shape(2, 5, 4, 2, 3, 3, 2, 2, 1, 1), 0)},
               {"3x3 pad 1, leaky ReLU", rectified(conv_shape(2, 4, 5, 3, 3, 3, 1, 1, 1, 1), 0.3)}};
  for (const auto& c : cases)
    for (const int64_t N : {1, 3}) {
      const Conv2d& s = c.shape;
      test_product(std::string("conv2d ") + c.name + " N=" + std::to_string(N), PRODUCT_OPS(conv2d), s, N, N * s.H * s.W * s.C,
                   s.KH * s.KW * s.C * s.F, s.F, N * s.OH * s.OW * s.F);
    }
  // One channel, 3x3 image 1..9, kernel [[1, 2], [3, 4]]: a cross-correlation, not a flipped convolution.
  const Vec z =
      run({Op::conv2d_fwd, conv_shape(1, 3, 3, 1, 2, 2, 1, 1, 0, 0), 1}, {hole(4), {1, 2, 3, 4, 5, 6, 7, 8, 9}, {1, 2, 3, 4}, {100}})[0];
  expect_close("conv2d_fwd by hand", {z}, {{137, 147, 167, 177}}, 0);
  // Two channels, two filters, 1x1: w is [KH, KW, C, F].
  const Vec u = run({Op::conv2d_fwd, conv_shape(2, 1, 1, 2, 1, 1, 1, 1, 0, 0), 1}, {hole(2), {5, 7}, {1, 10, 2, 20}, {}})[0];
  expect_close("conv2d_fwd by hand, w is [KH, KW, C, F]", {u}, {{19, 190}}, 0);
}

// ---------------------------------------------------------------- batch norm

struct BatchNormCase {
  std::string name;
  BatchNorm shape;
  int64_t N, stat_examples;
  bool gamma, beta;
};

void test_batch_norm(const BatchNormCase& c) {
  const int64_t C = c.shape.C, size = c.N * c.shape.spatial * C;
  const bool frozen = c.shape.frozen;
  const Vec none, mean = draw(C);
  Vec var = draw(C);
  for (double& v : var) v = 0.5 + v * v;
  auto one = [&](Op op) { return Sized{op, c.shape, c.N, c.stat_examples}; };
  auto gamma = [&](const Values& v) { return c.gamma ? v[1] : none; };
  auto beta = [&](const Values& v) { return c.beta ? v.back() : none; };
  auto stats = [&](const Values& v) {
    return frozen ? run(one(Op::batch_norm_frozen_stats), {hole(2 * C), mean, var})[0]
                  : run(one(Op::batch_norm_stats), {hole(2 * C), v[0]})[0];
  };
  auto stats_dot = [&](const Values& v, const Values& d) {
    return frozen ? none : run(one(Op::batch_norm_stats_jvp), {hole(2 * C), v[0], d[0], stats(v)})[0];
  };
  auto weight = [&](const Values& v, const Vec& dy) { return run(one(Op::batch_norm_bwd_weight), {hole(C), hole(C), v[0], dy, stats(v)}); };
  auto weight_jvp = [&](const Values& v, const Values& d, const Vec& dy, const Vec& dy_dot) {
    return run(one(Op::batch_norm_bwd_weight_jvp), {hole(C), hole(C), v[0], d[0], dy, dy_dot, stats(v), stats_dot(v, d)});
  };
  auto gradients = [&](const Vec& dx, const Values& w) {
    Values out{dx};
    if (c.gamma) out.push_back(w[0]);
    if (c.beta) out.push_back(w[1]);
    return out;
  };
  Piece piece;
  piece.forward = [&](const Values& v) { return Values{run(one(Op::batch_norm_fwd), {hole(size), v[0], stats(v), gamma(v), beta(v)})[0]}; };
  piece.forward_jvp = [&](const Values& v, const Values& d) {
    return Values{run(one(Op::batch_norm_fwd_jvp), {hole(size), v[0], d[0], stats(v), stats_dot(v, d), gamma(v), gamma(d), beta(d)})[0]};
  };
  piece.backward = [&](const Values& v, const Vec& dy) {
    const Values w = weight(v, dy);
    return gradients(run(one(Op::batch_norm_bwd_data), {hole(size), v[0], dy, stats(v), gamma(v), w[0], w[1]})[0], w);
  };
  piece.backward_jvp = [&](const Values& v, const Values& d, const Vec& dy, const Vec& dy_dot) {
    const Values w = weight(v, dy), w_dot = weight_jvp(v, d, dy, dy_dot);
    return gradients(run(one(Op::batch_norm_bwd_data_jvp), {hole(size), v[0], d[0], dy, dy_dot, stats(v), stats_dot(v, d), gamma(v),
                                                            gamma(d), w[0], w[1], w_dot[0], w_dot[1]})[0],
                     w_dot);
  };
  Values v{draw(size)};
  if (c.gamma) v.push_back(draw(C));
  if (c.beta) v.push_back(draw(C));
  check("batch_norm " + c.name, piece, v);

  // An absent x_dot with absent stats_dot (a first layer) is a zero tangent.
  Values d = draw_like(v);
  Values zero_x = d;
  zero_x[0] = zeros(d[0]);
  const Vec dy = draw(size), dy_dot = draw(size), s = stats(v);
  const Values w = weight(v, dy);
  const Values w_dot = run(one(Op::batch_norm_bwd_weight_jvp), {hole(C), hole(C), v[0], none, dy, dy_dot, s, none});
  const Vec y_dot = run(one(Op::batch_norm_fwd_jvp), {hole(size), v[0], none, s, none, gamma(v), gamma(d), beta(d)})[0];
  const Vec dx_dot = run(one(Op::batch_norm_bwd_data_jvp),
                         {hole(size), v[0], none, dy, dy_dot, s, none, gamma(v), gamma(d), w[0], w[1], w_dot[0], w_dot[1]})[0];
  Values got{y_dot}, want{piece.forward_jvp(v, zero_x)[0]};
  for (const Vec& g : gradients(dx_dot, w_dot)) got.push_back(g);
  for (const Vec& g : piece.backward_jvp(v, zero_x, dy, dy_dot)) want.push_back(g);
  expect_close("batch_norm " + c.name + ": an absent x_dot and stats_dot are zero", got, want, 0);
}

void test_batch_norms() {
  const double eps = 1e-3;
  const BatchNormCase cases[] = {{"vectors", {3, 1, eps, false}, 4, 4, true, true},
                                 {"images", {2, 6, eps, false}, 3, 3, true, true},
                                 {"images, not affine", {2, 4, eps, false}, 3, 3, false, false},
                                 {"images, beta only (MAML)", {2, 4, eps, false}, 2, 2, false, true},
                                 {"one example of an image", {2, 5, eps, false}, 1, 1, true, true},
                                 {"support vectors 3 of 5", {3, 1, eps, false}, 5, 3, true, true},
                                 {"support images 2 of 5", {2, 4, eps, false}, 5, 2, true, true},
                                 {"support images, not affine", {2, 4, eps, false}, 4, 1, false, false},
                                 {"frozen vectors", {3, 1, eps, true}, 4, 4, true, true},
                                 {"frozen images", {2, 4, eps, true}, 3, 3, true, true},
                                 {"frozen images, not affine", {2, 4, eps, true}, 3, 3, false, false}};
  for (const BatchNormCase& c : cases) test_batch_norm(c);

  // Columns 1 3 5 and 2 2 2, eps 1/9: means 3 and 2; variances 8/3 and 0 (biased).
  const BatchNorm shape{2, 1, 1.0 / 9, false};
  const Vec stats = run({Op::batch_norm_stats, shape, 3}, {hole(4), {1, 2, 3, 2, 5, 2}})[0];
  expect_close("batch_norm_stats by hand", {stats}, {{3, 2, 1 / std::sqrt(8.0 / 3 + 1.0 / 9), 3}}, kRounding);
  // With the support rows 1 and 3 in front, the query row 5 lies outside the statistics.
  const Vec support = run({Op::batch_norm_stats, BatchNorm{1, 1, 0, false}, 3, 2}, {hole(2), {1, 3, 5}})[0];
  expect_close("batch_norm_stats by hand, support rows", {support}, {{2, 1}}, kRounding);
  const Vec y = run({Op::batch_norm_fwd, BatchNorm{1, 1, 0, false}, 3, 2}, {hole(3), {1, 3, 5}, support, {10}, {7}})[0];
  expect_close("batch_norm_fwd by hand, query row", {y}, {{-3, 17, 37}}, kRounding);
  // A mean of 1e6 with deviations of 1e-3: the one-pass variance would have no digit right.
  const Vec far = run({Op::batch_norm_stats, BatchNorm{1, 1, 0, false}, 2}, {hole(2), {1e6 - 1e-3, 1e6 + 1e-3}})[0];
  expect_close("batch_norm_stats far from zero", {{far[1]}}, {{1e3}}, 1e-6);
}

// ---------------------------------------------------------------- group norm

void test_group_norm(const std::string& name, const GroupNorm& shape, int64_t N, bool affine) {
  const int64_t C = shape.channels, size = N * shape.spatial * C, stat = 2 * N * shape.groups;
  const Vec none;
  auto one = [&](Op op) { return Sized{op, shape, N}; };
  auto gamma = [&](const Values& v) { return affine ? v[1] : none; };
  auto beta = [&](const Values& v) { return affine ? v[2] : none; };
  auto forward = [&](const Values& v) { return run(one(Op::group_norm_fwd), {hole(size), hole(stat), v[0], gamma(v), beta(v)}); };
  auto y_of = [&](const Values& v) { return shape.y.on ? forward(v)[0] : none; };
  auto jvp = [&](const Values& v, const Values& d) {
    return run(one(Op::group_norm_fwd_jvp), {hole(size), hole(stat), v[0], d[0], forward(v)[1], gamma(v), gamma(d), beta(d), y_of(v)});
  };
  auto first = [&](const Values& out) { return affine ? Values{out[0], out[1], out[2]} : Values{out[0]}; };
  Piece piece;
  piece.forward = [&](const Values& v) { return Values{forward(v)[0]}; };
  piece.forward_jvp = [&](const Values& v, const Values& d) { return Values{jvp(v, d)[0]}; };
  piece.backward = [&](const Values& v, const Vec& dy) {
    return first(run(one(Op::group_norm_bwd), {hole(size), hole(C), hole(C), v[0], dy, forward(v)[1], gamma(v), y_of(v)}));
  };
  piece.backward_jvp = [&](const Values& v, const Values& d, const Vec& dy, const Vec& dy_dot) {
    return first(run(one(Op::group_norm_bwd_jvp),
                     {hole(size), hole(C), hole(C), v[0], d[0], dy, dy_dot, forward(v)[1], jvp(v, d)[1], gamma(v), gamma(d), y_of(v)}));
  };
  Values v{draw(size)};
  if (affine) v.push_back(draw(C)), v.push_back(draw(C));
  check("group_norm " + name, piece, v);

  Values d = draw_like(v);
  const Vec dy = draw(size), dy_dot = draw(size), s = forward(v)[1], s_dot = jvp(v, d)[1], y = y_of(v);
  const Values no_dx = run(one(Op::group_norm_bwd), {none, hole(C), hole(C), v[0], dy, s, gamma(v), y});
  const Values with_dx = run(one(Op::group_norm_bwd), {hole(size), hole(C), hole(C), v[0], dy, s, gamma(v), y});
  const Values no_dx_dot =
      run(one(Op::group_norm_bwd_jvp), {none, hole(C), hole(C), v[0], d[0], dy, dy_dot, s, s_dot, gamma(v), gamma(d), y});
  const Values with_dx_dot =
      run(one(Op::group_norm_bwd_jvp), {hole(size), hole(C), hole(C), v[0], d[0], dy, dy_dot, s, s_dot, gamma(v), gamma(d), y});
  expect_close("group_norm " + name + ": without dx the parameter gradients are the same", {no_dx[1], no_dx[2], no_dx_dot[1], no_dx_dot[2]},
               {with_dx[1], with_dx[2], with_dx_dot[1], with_dx_dot[2]}, 0);

  d[0] = zeros(d[0]);
  const Values y_dot = run(one(Op::group_norm_fwd_jvp), {hole(size), hole(stat), v[0], none, s, gamma(v), gamma(d), beta(d), y});
  const Values absent =
      run(one(Op::group_norm_bwd_jvp), {hole(size), hole(C), hole(C), v[0], none, dy, dy_dot, s, none, gamma(v), gamma(d), y});
  Values got{y_dot[0], y_dot[1]}, want{jvp(v, d)[0], jvp(v, d)[1]};
  for (const Vec& g : first(absent)) got.push_back(g);
  for (const Vec& g : piece.backward_jvp(v, d, dy, dy_dot)) want.push_back(g);
  expect_close("group_norm " + name + ": an absent x_dot and stats_dot are zero", got, want, 0);
}

void test_group_norms() {
  test_group_norm("2 groups of images", {4, 3, 2, 1e-3}, 2, true);
  test_group_norm("3 groups of one channel (instance norm)", {3, 4, 3, 1e-3}, 2, true);
  test_group_norm("layer norm of vectors", {5, 1, 1, 1e-3}, 3, true);
  test_group_norm("layer norm, not affine", {6, 1, 1, 1e-3}, 2, false);
  test_group_norm("2 groups of images, ReLU", {4, 3, 2, 1e-3, {true, 0}}, 2, true);
  test_group_norm("layer norm, leaky ReLU", {5, 1, 1, 1e-3, {true, 0.3}}, 3, false);
  // Pixels (1 3 | 10 20) and (5 7 | 30 40) in two groups: means 4 and 25, variances 5 and 125.
  const Values out = run({Op::group_norm_fwd, GroupNorm{4, 2, 2, 0}, 1}, {hole(8), hole(4), {1, 3, 10, 20, 5, 7, 30, 40}, {}, {}});
  const double a = 1 / std::sqrt(5.0), b = 1 / std::sqrt(125.0);
  expect_close("group_norm_fwd by hand", {out[1], out[0]}, {{4, a, 25, b}, {-3 * a, -a, -15 * b, -5 * b, a, 3 * a, 5 * b, 15 * b}},
               kRounding);
}

// ---------------------------------------------------------------- pointwise

void test_pointwise() {
  using Kind = Pointwise::Kind;
  const struct {
    const char* name;
    Kind kind;
    double at_one, at_minus_two;
  } cases[] = {{"relu", Kind::relu, 1, 0},
               {"leaky_relu", Kind::leaky_relu, 1, -0.2},
               {"tanh", Kind::tanh, std::tanh(1.0), std::tanh(-2.0)},
               {"sigmoid", Kind::sigmoid, 0.7310585786300049, 0.11920292202211755},
               {"silu", Kind::silu, 0.7310585786300049, -0.2384058440442351},
               {"gelu", Kind::gelu, 0.8413447460685429, -0.04550026389635842},
               {"gelu_tanh", Kind::gelu_tanh, 0.8411919906082768, -0.0454023059122187}};
  for (const auto& c : cases) {
    const int64_t N = 3, size = 5;
    const Pointwise f{c.kind, 0.1, size};
    auto one = [&](Op op) { return Sized{op, f, N}; };
    Piece piece;
    piece.forward = [&](const Values& v) { return Values{run(one(Op::pointwise_fwd), {hole(N * size), v[0]})[0]}; };
    piece.forward_jvp = [&](const Values& v, const Values& d) {
      return Values{run(one(Op::pointwise_fwd_jvp), {hole(N * size), v[0], d[0]})[0]};
    };
    piece.backward = [&](const Values& v, const Vec& dy) { return Values{run(one(Op::pointwise_bwd), {hole(N * size), v[0], dy})[0]}; };
    piece.backward_jvp = [&](const Values& v, const Values& d, const Vec& dy, const Vec& dy_dot) {
      return Values{run(one(Op::pointwise_bwd_jvp), {hole(N * size), v[0], d[0], dy, dy_dot})[0]};
    };
    const std::string name = std::string("pointwise ") + c.name;
    const Vec x = draw_spread(N * size, 0.2), dy = draw(N * size), dy_dot = draw(N * size);
    check(name, piece, {x});
    expect_close(name + ": an absent x_dot is zero", {run(one(Op::pointwise_bwd_jvp), {hole(N * size), x, {}, dy, dy_dot})[0]},
                 piece.backward_jvp({x}, {zeros(x)}, dy, dy_dot), 0);
    const Vec y = run({Op::pointwise_fwd, Pointwise{c.kind, 0.1, 2}, 1}, {hole(2), {1, -2}})[0];
    expect_close(name + ": known values at 1 and -2", {y}, {{c.at_one, c.at_minus_two}}, kRounding);
    const Vec lost = run({Op::pointwise_fwd, Pointwise{c.kind, 0.1, 1}, 1}, {hole(1), {kNaN}})[0];
    report(name + ": NaN stays NaN", std::isnan(lost[0]), "");
    const Vec extreme = run({Op::pointwise_fwd, Pointwise{c.kind, 0.1, 2}, 1}, {hole(2), {800, -800}})[0];
    const Vec slope = run({Op::pointwise_bwd, Pointwise{c.kind, 0.1, 2}, 1}, {hole(2), {800, -800}, {1, 1}})[0];
    report(name + ": finite at 800 and -800", std::isfinite(extreme[0] + extreme[1] + slope[0] + slope[1]), "");
  }
  const Vec zero = run({Op::pointwise_bwd, Pointwise{Kind::relu, 0, 2}, 1}, {hole(2), {0.0, -0.0}, {1, 1}})[0];
  const Vec leaky = run({Op::pointwise_bwd, Pointwise{Kind::leaky_relu, 0.1, 1}, 1}, {hole(1), {0.0}, {1}})[0];
  expect_close("relu'(0) = 0, leaky_relu'(0) = slope", {zero, leaky}, {{0, 0}, {0.1}}, 0);
}

// ---------------------------------------------------------------- pooling, flatten

Pool2d pool_shape(int64_t C, int64_t H, int64_t W, int64_t KH, int64_t KW, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                  bool include = true) {
  return {C, H, W, (H + 2 * ph - KH) / sh + 1, (W + 2 * pw - KW) / sw + 1, KH, KW, sh, sw, ph, pw, include};
}

// A linear map: y = A x, its jvp is itself, its gradient A^T dy.
Piece linear_piece(const std::function<Vec(const Values& x, const Vec& value)>& forward_of, const Function& forward,
                   const std::function<Vec(const Values& x, const Vec& dy)>& backward) {
  Piece piece;
  piece.forward = forward;
  piece.forward_jvp = [=](const Values& v, const Values& d) { return Values{forward_of(v, d[0])}; };
  piece.backward = [=](const Values& v, const Vec& dy) { return Values{backward(v, dy)}; };
  piece.backward_jvp = [=](const Values& v, const Values&, const Vec&, const Vec& dy_dot) { return Values{backward(v, dy_dot)}; };
  return piece;
}

void test_pools() {
  const struct {
    const char* name;
    Pool2d shape;
  } cases[] = {{"2x2", pool_shape(2, 4, 4, 2, 2, 2, 2, 0, 0)},
               {"2x2 of 5x5, last row and column unused", pool_shape(2, 5, 5, 2, 2, 2, 2, 0, 0)},
               {"3x3 stride 2 pad 1, overlapping", pool_shape(2, 5, 4, 3, 3, 2, 2, 1, 1)},
               {"3x3 stride 2 pad 1, padding not counted", pool_shape(2, 5, 4, 3, 3, 2, 2, 1, 1, false)},
               {"3x2 stride 1,2 pad 1,0", pool_shape(1, 3, 4, 3, 2, 1, 2, 1, 0)},
               {"global", pool_shape(3, 3, 2, 3, 2, 1, 1, 0, 0)}};
  for (const auto& c : cases) {
    const int64_t N = 2, in = N * c.shape.H * c.shape.W * c.shape.C, out = N * c.shape.OH * c.shape.OW * c.shape.C;
    auto one = [&](Op op) { return Sized{op, c.shape, N}; };
    auto index = [&](const Values& v) { return run(one(Op::max_pool2d_fwd), {hole(out), hole(out), v[0]})[1]; };
    check(std::string("max_pool2d ") + c.name,
          linear_piece([&](const Values& v, const Vec& d) { return run(one(Op::max_pool2d_fwd_jvp), {hole(out), d, index(v)})[0]; },
                       [&](const Values& v) { return Values{run(one(Op::max_pool2d_fwd), {hole(out), hole(out), v[0]})[0]}; },
                       [&](const Values& v, const Vec& dy) { return run(one(Op::max_pool2d_bwd), {hole(in), dy, index(v)})[0]; }),
          {draw_spread(in)});
    auto average = [&](const Values&, const Vec& x) { return run(one(Op::avg_pool2d_fwd), {hole(out), x})[0]; };
    check(std::string("avg_pool2d ") + c.name,
          linear_piece(
              average, [&](const Values& v) { return Values{average(v, v[0])}; },
              [&](const Values&, const Vec& dy) { return run(one(Op::avg_pool2d_bwd), {hole(in), dy})[0]; }),
          {draw(in)});
  }

  auto max_of = [](const Pool2d& shape, const Vec& x) {
    const int64_t out = shape.OH * shape.OW * shape.C;
    const Values r = run({Op::max_pool2d_fwd, shape, 1}, {hole(out), hole(out), x});
    return Values{r[0], r[1]};
  };
  const Pool2d two = pool_shape(1, 2, 2, 2, 2, 2, 2, 0, 0);
  expect_close("max_pool2d: the first of a tie", max_of(two, {3, 5, 5, 5}), {{5}, {1}}, 0);
  expect_close("max_pool2d: all equal", max_of(two, {2, 2, 2, 2}), {{2}, {0}}, 0);
  const Values lost = max_of(two, {3, kNaN, 9, 1});
  report("max_pool2d: NaN wins", std::isnan(lost[0][0]) && lost[1][0] == 1, "");
  expect_close("max_pool2d: -inf everywhere", max_of(two, {-kInf, -kInf, -kInf, -kInf}), {{-kInf}, {0}}, 0);
  // All values negative, padding 1: a zero in the padding would win if it counted. 2x2 image in 2x2 windows: the
  // corners.
  expect_close("max_pool2d: padding never wins", max_of(pool_shape(1, 2, 2, 2, 2, 2, 2, 1, 1), {-1, -2, -3, -4}),
               {{-1, -2, -3, -4}, {3, 2, 1, 0}}, 0);
  auto average_of = [](const Pool2d& shape, const Vec& x) {
    return run({Op::avg_pool2d_fwd, shape, 1}, {hole(shape.OH * shape.OW * shape.C), x})[0];
  };
  expect_close("avg_pool2d by hand", {average_of(two, {1, 2, 3, 6})}, {{3}}, 0);
  expect_close("avg_pool2d: padding counted", {average_of(pool_shape(1, 2, 2, 2, 2, 2, 2, 1, 1, true), {4, 8, 12, 16})}, {{1, 2, 3, 4}}, 0);
  expect_close("avg_pool2d: padding not counted", {average_of(pool_shape(1, 2, 2, 2, 2, 2, 2, 1, 1, false), {4, 8, 12, 16})},
               {{4, 8, 12, 16}}, 0);
}

// ---------------------------------------------------------------- batch norm, max-pool and activation in one

void test_norm_pool_act(const std::string& name, const NormPoolAct& shape, int64_t N, int64_t stat_examples, bool affine) {
  const int64_t C = shape.norm.C, in = N * shape.pool.H * shape.pool.W * C, out = N * shape.pool.OH * shape.pool.OW * C;
  const Vec none, mean = draw(C), picked = shape.pooled ? hole(out) : none;
  Vec var = draw(C);
  for (double& v : var) v = 0.5 + v * v;
  auto one = [&](Op op) { return Sized{op, shape, N, stat_examples}; };
  auto of_norm = [&](Op op) { return Sized{op, shape.norm, N, stat_examples}; };
  auto gamma = [&](const Values& v) { return affine ? v[1] : none; };
  auto beta = [&](const Values& v) { return affine ? v[2] : none; };
  auto stats = [&](const Values& v) {
    return shape.norm.frozen ? run(of_norm(Op::batch_norm_frozen_stats), {hole(2 * C), mean, var})[0]
                             : run(of_norm(Op::batch_norm_stats), {hole(2 * C), v[0]})[0];
  };
  auto stats_dot = [&](const Values& v, const Values& d) {
    return shape.norm.frozen ? none : run(of_norm(Op::batch_norm_stats_jvp), {hole(2 * C), v[0], d[0], stats(v)})[0];
  };
  struct Forward {
    Vec y, tap, winner;
  };
  auto forward = [&](const Values& v) {
    const Values r = run(one(Op::norm_pool_act_fwd), {hole(out), picked, picked, v[0], stats(v), gamma(v), beta(v)});
    return Forward{r[0], r[1], shape.pooled ? r[2] : v[0]};
  };
  // y_dot and what the backward pass takes for the winners' tangents; `s_dot` as stats_dot
  auto tangent = [&](const Values& v, const Vec& x_dot, const Vec& s_dot, const Values& d) {
    const Forward f = forward(v);
    const Vec target = x_dot.empty() ? none : picked;
    const Values r = run(one(Op::norm_pool_act_fwd_jvp),
                         {hole(out), target, f.tap, f.winner, x_dot, stats(v), s_dot, gamma(v), gamma(d), beta(v), beta(d)});
    return Values{r[0], shape.pooled ? r[1] : x_dot};
  };
  auto weight = [&](const Values& v, const Vec& dy) {
    return run(one(Op::norm_pool_act_bwd_weight), {hole(C), hole(C), forward(v).winner, dy, stats(v), gamma(v), beta(v)});
  };
  auto gradients = [&](const Vec& dx, const Values& w) { return affine ? Values{dx, w[0], w[1]} : Values{dx}; };
  auto backward_jvp = [&](const Values& v, const Vec& x_dot, const Vec& s_dot, const Values& d, const Vec& dy, const Vec& dy_dot) {
    const Forward f = forward(v);
    const Vec s = stats(v);
    const Values w = weight(v, dy);
    const Values w_dot = run(one(Op::norm_pool_act_bwd_weight_jvp),
                             {hole(C), hole(C), f.winner, tangent(v, x_dot, s_dot, d)[1], dy, dy_dot, s, s_dot, gamma(v), beta(v)});
    return gradients(run(one(Op::norm_pool_act_bwd_data_jvp), {hole(in), f.tap, v[0], x_dot, dy, dy_dot, s, s_dot, gamma(v), gamma(d),
                                                               beta(v), w[0], w[1], w_dot[0], w_dot[1]})[0],
                     w_dot);
  };
  Piece piece;
  piece.forward = [&](const Values& v) { return Values{forward(v).y}; };
  piece.forward_jvp = [&](const Values& v, const Values& d) { return Values{tangent(v, d[0], stats_dot(v, d), d)[0]}; };
  piece.backward = [&](const Values& v, const Vec& dy) {
    const Values w = weight(v, dy);
    return gradients(run(one(Op::norm_pool_act_bwd_data), {hole(in), forward(v).tap, v[0], dy, stats(v), gamma(v), beta(v), w[0], w[1]})[0],
                     w);
  };
  piece.backward_jvp = [&](const Values& v, const Values& d, const Vec& dy, const Vec& dy_dot) {
    return backward_jvp(v, d[0], stats_dot(v, d), d, dy, dy_dot);
  };
  Values v{draw_spread(in)};
  if (affine) {
    v.push_back(draw(C));  // of both signs
    v.push_back(draw(C));
  }
  check("norm_pool_act " + name, piece, v);

  const Values d = draw_like(v);
  Values zero_x = d;
  zero_x[0] = zeros(d[0]);
  const Vec dy = draw(out), dy_dot = draw(out);
  Values got = backward_jvp(v, none, none, d, dy, dy_dot), want = piece.backward_jvp(v, zero_x, dy, dy_dot);
  got.push_back(tangent(v, none, none, d)[0]);
  want.push_back(piece.forward_jvp(v, zero_x)[0]);
  expect_close("norm_pool_act " + name + ": an absent x_dot and stats_dot are zero", got, want, 0);
}

void test_norm_pool_acts() {
  const struct {
    const char* name;
    Pool2d pool;
    double slope;
    int64_t stat_examples = 3;
    bool frozen = false, affine = true, pooled = true;
  } cases[] = {{"2x2", pool_shape(2, 4, 4, 2, 2, 2, 2, 0, 0), 0},
               {"2x2 leaky of 5x5, last row and column unused", pool_shape(3, 5, 5, 2, 2, 2, 2, 0, 0), 0.1},
               {"3x3 stride 2 pad 1, overlapping", pool_shape(2, 5, 4, 3, 3, 2, 2, 1, 1), 0.2},
               {"3x2 stride 1,2 pad 1,0", pool_shape(1, 3, 4, 3, 2, 1, 2, 1, 0), 0},
               {"not affine", pool_shape(2, 4, 3, 2, 2, 2, 1, 0, 0), 0, 3, false, false},
               {"2x2 frozen", pool_shape(2, 4, 5, 2, 2, 2, 2, 0, 0), 0.1, 3, true},
               {"3x3 support 2 of 3", pool_shape(2, 5, 5, 3, 3, 2, 2, 1, 1), 0, 2},
               {"2x2 support 1 of 3", pool_shape(2, 5, 4, 2, 2, 2, 2, 0, 0), 0.3, 1},
               {"without a pool", pool_shape(3, 3, 2, 1, 1, 1, 1, 0, 0), 0, 3, false, true, false},
               {"leaky without a pool, support 2 of 3", pool_shape(3, 3, 2, 1, 1, 1, 1, 0, 0), 0.1, 2, false, true, false},
               {"frozen vectors without a pool", pool_shape(3, 1, 1, 1, 1, 1, 1, 0, 0), 0, 3, true, false, false}};
  for (const auto& c : cases)
    test_norm_pool_act(c.name, {{c.pool.C, c.pool.H * c.pool.W, 1e-3, c.frozen}, c.pool, c.pooled, c.slope}, 3, c.stat_examples, c.affine);

  // mean 0, r 1: z is gamma x + beta.
  auto y_of = [](double slope, const Vec& x, double gamma, double beta) {
    const NormPoolAct shape{{1, 4, 0, true}, pool_shape(1, 2, 2, 2, 2, 2, 2, 0, 0), true, slope};
    return run({Op::norm_pool_act_fwd, shape, 1}, {hole(1), hole(1), hole(1), x, {0, 1}, {gamma}, {beta}});
  };
  auto by_hand = [&](const char* what, double slope, const Vec& x, double gamma, double beta, const Values& want) {
    const Values r = y_of(slope, x, gamma, beta);
    expect_close(std::string("norm_pool_act: ") + what, {r[0], r[1], r[2]}, want, 0);
  };
  by_hand("the first of a tie", 0, {3, 5, 5, 5}, 2, 1, {{11}, {1}, {5}});
  by_hand("a negative gamma picks the smallest x", 0, {3, 2, -1, 4}, -2, 1, {{3}, {2}, {-1}});
  by_hand("gamma 0: all tie", 0, {3, 5, 7, 9}, 0, 1, {{1}, {0}, {3}});
  by_hand("not positive: ~tap", 0, {-3, -1, -2, -4}, 1, 0, {{0}, {~1}, {-1}});
  by_hand("not positive, leaky", 0.5, {-3, -1, -2, -4}, 1, 0, {{-0.5}, {~1}, {-1}});
  by_hand("zero is not positive", 0, {0, 0, -1, 0}, 1, 0, {{0}, {~0}, {0}});
  by_hand("-inf everywhere", 0, {-kInf, -kInf, -kInf, -kInf}, 1, 0, {{0}, {~0}, {-kInf}});
  const Values lost = y_of(0, {3, kNaN, 9, 1}, 1, 0), leaky = y_of(0.5, {3, kNaN, 9, 1}, 1, 0);
  report("norm_pool_act: NaN wins, and passes a ReLU", std::isnan(lost[0][0]) && lost[1][0] == 1 && std::isnan(lost[2][0]), "");
  report("norm_pool_act: NaN wins, and is low for a leaky ReLU", std::isnan(leaky[0][0]) && leaky[1][0] == ~1, "");
}

void test_flatten() {
  const Flatten shape{3, 2, 2};
  auto forward = [&](const Values&, const Vec& x) { return run({Op::flatten_fwd, shape, 2}, {hole(24), x})[0]; };
  check("flatten",
        linear_piece(
            forward, [&](const Values& v) { return Values{forward(v, v[0])}; },
            [&](const Values&, const Vec& dy) { return run({Op::flatten_bwd, shape, 2}, {hole(24), dy})[0]; }),
        {draw(24)});
  // Pixel p, channel c holds 10 c + p: torch's order counts through the pixels of a channel first.
  const Vec y = run({Op::flatten_fwd, Flatten{2, 1, 3}, 1}, {hole(6), {0, 10, 1, 11, 2, 12}})[0];
  expect_close("flatten_fwd by hand", {y}, {{0, 1, 2, 10, 11, 12}}, 0);
}

// ---------------------------------------------------------------- losses

void test_loss(const std::string& name, Op op, Op jvp, const Loss& shape, int64_t N, const Vec& target, const Vec& weights) {
  const int64_t size = N * shape.size;
  auto loss = [&](const Values& v) { return Values{run({op, shape, N}, {hole(1), hole(size), v[0], target, weights})[0]}; };
  auto gradient = [&](const Values& v) { return Values{run({op, shape, N}, {hole(1), hole(size), v[0], target, weights})[1]}; };
  const Values z{draw(size)}, z_dot = draw_like(z);
  Vec by_entry;
  for (int64_t i = 0; i < size; ++i) {
    Values unit{Vec(size, 0.0)};
    unit[0][i] = 1;
    by_entry.push_back(difference(loss, z, unit)[0][0]);
  }
  expect_close(name + ": dz is the gradient of the loss", gradient(z), {by_entry}, kDifference);
  expect_close(name + ": jvp is the derivative of dz", {run({jvp, shape, N}, {hole(size), z[0], z_dot[0], target, weights})[0]},
               difference(gradient, z, z_dot), kDifference);
  expect_close(name + ": the loss alone", {run({op, shape, N}, {hole(1), {}, z[0], target, weights})[0]}, loss(z), 0);
  if (weights.empty())
    expect_close(name + ": absent weights are 1/N", loss(z),
                 {run({op, shape, N}, {hole(1), {}, z[0], target, Vec(N, 1.0 / static_cast<double>(N))})[0]}, 0);
}

void test_losses() {
  for (const bool weighted : {false, true}) {
    const Vec w3 = weighted ? draw(3) : Vec(), w1 = weighted ? draw(1) : Vec();
    const std::string kind = weighted ? ", weighted" : "";
    const Loss plain{Loss::Kind::cross_entropy, 4, 0}, smooth{Loss::Kind::cross_entropy, 4, 0.1};
    const Loss square{Loss::Kind::mse, 2, 0}, one{Loss::Kind::mse, 1, 0};
    test_loss("cross_entropy" + kind, Op::cross_entropy, Op::cross_entropy_jvp, plain, 3, {1, 3, 0}, w3);
    test_loss("cross_entropy smoothed" + kind, Op::cross_entropy, Op::cross_entropy_jvp, smooth, 3, {2, 2, 0}, w3);
    test_loss("cross_entropy of one example" + kind, Op::cross_entropy, Op::cross_entropy_jvp, plain, 1, {2}, w1);
    test_loss("mse" + kind, Op::mse, Op::mse_jvp, square, 3, draw(6), w3);
    test_loss("mse of one output" + kind, Op::mse, Op::mse_jvp, one, 3, draw(3), w3);
  }
  auto cross_entropy = [](const Vec& z, double label, double smoothing) {
    return run({Op::cross_entropy, Loss{Loss::Kind::cross_entropy, static_cast<int64_t>(z.size()), smoothing}, 1},
               {hole(1), hole(static_cast<int64_t>(z.size())), z, {label}, {}});
  };
  const double ln3 = std::log(3.0);
  Values r = cross_entropy({7, 7, 7}, 1, 0);
  expect_close("cross_entropy of equal outputs is log classes", {r[0], r[1]}, {{ln3}, {1.0 / 3, -2.0 / 3, 1.0 / 3}}, kRounding);
  r = cross_entropy({0, std::log(2.0)}, 0, 0.2);  // p = 1/3, 2/3;  t = 0.9, 0.1
  expect_close("cross_entropy smoothed by hand", {r[0], r[1]}, {{0.9 * ln3 + 0.1 * (ln3 - std::log(2.0))}, {1.0 / 3 - 0.9, 2.0 / 3 - 0.1}},
               kRounding);
  r = cross_entropy({1000, 0, -1000}, 1, 0);
  expect_close("cross_entropy does not overflow", {r[0], r[1]}, {{1000}, {1, -1, 0}}, kRounding);
  r = run({Op::mse, Loss{Loss::Kind::mse, 2, 0}, 2}, {hole(1), hole(4), {1, 2, 3, 4}, {0, 0, 3, 0}, {}});
  expect_close("mse by hand", {r[0], r[1]}, {{5.25}, {0.5, 1, 0, 2}}, kRounding);
}

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

// A pointwise function and its tangent in one are the two alone.
void test_pointwise_dual() {
  const int64_t size = 7;
  const Vec x = draw(size), x_dot = draw(size), dy = draw(size), dy_dot = draw(size), none;
  using Kind = Pointwise::Kind;
  for (const Kind kind : {Kind::relu, Kind::leaky_relu, Kind::tanh, Kind::sigmoid, Kind::gelu, Kind::gelu_tanh, Kind::silu}) {
    const Pointwise f{kind, 0.1, size};
    const std::string name = "pointwise " + std::to_string(int(kind));
    const Values fwd = run({Op::pointwise_fwd_dual, f}, {hole(size), hole(size), x, x_dot});
    expect_close(name + ": forward", {fwd[0], fwd[1]},
                 {run({Op::pointwise_fwd, f}, {hole(size), x})[0], run({Op::pointwise_fwd_jvp, f}, {hole(size), x, x_dot})[0]}, 0);
    for (const Vec& along : {x_dot, none}) {
      const Values bwd = run({Op::pointwise_bwd_dual, f}, {hole(size), hole(size), x, along, dy, dy_dot});
      expect_close(
          name + ": back", {bwd[0], bwd[1]},
          {run({Op::pointwise_bwd, f}, {hole(size), x, dy})[0], run({Op::pointwise_bwd_jvp, f}, {hole(size), x, along, dy, dy_dot})[0]}, 0);
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

void test_tree_reduce() {
  const OpTable& table = reference_ops();
  for (const int64_t T : {1, 2, 3, 5, 8, 11}) {
    const int64_t size = 3;
    const Vec x = draw(T * size), w = draw(T);
    Vec sum(size, 0.0), mean(size, 0.0);
    for (int64_t t = 0; t < T; ++t)
      for (int64_t i = 0; i < size; ++i) {
        sum[i] += w[t] * x[t * size + i];
        mean[i] += x[t * size + i] / static_cast<double>(T);
      }
    Vec leaves = x, weighted = hole(size), plain = hole(size);
    table.tree_reduce(weighted.data(), leaves.data(), w.data(), T, size, size, 0);
    leaves = x;
    table.tree_reduce(plain.data(), leaves.data(), nullptr, T, size, size, 0);
    expect_close("tree_reduce of " + std::to_string(T) + " tasks", {weighted, plain}, {sum, mean}, kRounding);
  }
  // 1 + 2^-53 is 1 again, 2^-53 + 2^-53 counts: only ((a + b) + (c + d)) gives the next number after 2.
  const double tiny = std::ldexp(1.0, -53);
  Vec leaves{1, 1, 2 * tiny, 2 * tiny, 5}, w{1, 1, 1, 1, 0}, out(1);
  table.tree_reduce(out.data(), leaves.data(), w.data(), 5, 1, 1, 0);
  expect_close("tree_reduce adds neighbours first", {out}, {{2 + 4 * tiny}}, 0);
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

void test_table() {
  const OpTable& table = reference_ops();
  for (int op = 0; op < kOps; ++op) {
    if (is_python_loss(static_cast<Op>(op))) continue;
    bool ran = false;
    for (const Recorded& r : recorded) ran = ran || static_cast<int>(r.what.op) == op;
    report(std::string(op_name(static_cast<Op>(op))) + " is in the table and was tested", table.run[op] && ran, "");
  }
  report("the table is float64 and knows lanes", table.real_bytes == 8 && table.lanes == kAnyLanes && table.tree_reduce, "");
}

}  // namespace

int main() {
  test_vectors();
  test_clips();
  test_linear_updates();
  test_pointwise_dual();
  test_momentum();
  test_adam();
  test_products();
  test_batch_norms();
  test_group_norms();
  test_pointwise();
  test_pools();
  test_norm_pool_acts();
  test_flatten();
  test_losses();
  test_tree_reduce();
  test_conjugate_gradient();
  test_table();
  test_layouts();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
