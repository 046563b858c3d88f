// Pointwise functions, pooling, flatten, and norm, pool and activation in one. Part of test_reference.cpp.
#pragma once

#include "reference_checks.h"

namespace {

// ---------------------------------------------------------------- pointwise

void test_pointwise() {
  using Kind = Pointwise::Kind;
  for (const Kind kind : kPointwise) {
    const int64_t N = 3, size = 5;
    const Pointwise f{kind, 0.1, size};
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
    const std::string name = std::string("pointwise ") + pointwise_name(kind);
    const Vec x = draw_spread(N * size, 0.2), dy = draw(N * size), dy_dot = draw(N * size);
    check(name, piece, {x});
    expect_close(name + ": an absent x_dot is zero", {run(one(Op::pointwise_bwd_jvp), {hole(N * size), x, {}, dy, dy_dot})[0]},
                 piece.backward_jvp({x}, {zeros(x)}, dy, dy_dot), 0);
    const Vec lost = run({Op::pointwise_fwd, Pointwise{kind, 0.1, 1}, 1}, {hole(1), {kNaN}})[0];
    report(name + ": NaN stays NaN", std::isnan(lost[0]), "");
    const Vec extreme = run({Op::pointwise_fwd, Pointwise{kind, 0.1, 2}, 1}, {hole(2), {800, -800}})[0];
    const Vec slope = run({Op::pointwise_bwd, Pointwise{kind, 0.1, 2}, 1}, {hole(2), {800, -800}, {1, 1}})[0];
    report(name + ": finite at 800 and -800", std::isfinite(extreme[0] + extreme[1] + slope[0] + slope[1]), "");
  }
  const Vec zero = run({Op::pointwise_bwd, Pointwise{Kind::relu, 0, 2}, 1}, {hole(2), {0.0, -0.0}, {1, 1}})[0];
  const Vec leaky = run({Op::pointwise_bwd, Pointwise{Kind::leaky_relu, 0.1, 1}, 1}, {hole(1), {0.0}, {1}})[0];
  expect_close("relu'(0) = 0, leaky_relu'(0) = slope", {zero, leaky}, {{0, 0}, {0.1}}, 0);
  const struct {
    Kind kind;
    double at_one, at_minus_two;
  } known[] = {{Kind::relu, 1, 0},
               {Kind::leaky_relu, 1, -0.2},
               {Kind::tanh, std::tanh(1.0), std::tanh(-2.0)},
               {Kind::sigmoid, 0.7310585786300049, 0.11920292202211755},
               {Kind::silu, 0.7310585786300049, -0.2384058440442351},
               {Kind::gelu, 0.8413447460685429, -0.04550026389635842},
               {Kind::gelu_tanh, 0.8411919906082768, -0.0454023059122187}};
  for (const auto& f : known) {
    const Vec y = run({Op::pointwise_fwd, Pointwise{f.kind, 0.1, 2}, 1}, {hole(2), {1, -2}})[0];
    expect_close(std::string("pointwise ") + pointwise_name(f.kind) + ": known values at 1 and -2", {y}, {{f.at_one, f.at_minus_two}},
                 kRounding);
  }
}

// A pointwise function and its tangent in one are the two alone.
void test_pointwise_dual() {
  const int64_t size = 7;
  const Vec x = draw(size), x_dot = draw(size), dy = draw(size), dy_dot = draw(size), none;
  using Kind = Pointwise::Kind;
  for (const Kind kind : kPointwise) {
    const Pointwise f{kind, 0.1, size};
    const std::string name = std::string("pointwise ") + pointwise_name(kind);
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

}  // namespace
