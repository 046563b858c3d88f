// Linear layers and convolutions, with and without rectifiers. Part of test_reference.cpp.
#pragma once

#include "reference_checks.h"

namespace {

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

}  // namespace
