// Batch norm and group norm. Part of test_reference.cpp.
#pragma once

#include "reference_checks.h"

namespace {

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

}  // namespace
