// Losses. Part of test_reference.cpp.
#pragma once

#include "reference_checks.h"

namespace {

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

}  // namespace
