// ReLU (slope 0) and leaky ReLU as selects on vectors.
#pragma once

#include "cpu/vec.h"

FASTMAML_CPU_BEGIN

// ReLU is a leaky ReLU of slope 0, but must not compute 0 * NaN or 0 * inf. A NaN passes, so that a diverged task stays visible.
template <class T>
struct Rectifier {
  T slope;

  template <class V>
  inline __attribute__((always_inline)) auto passes(V x) const {
    using Mask = decltype((x > V{}) | (x != x));  // for one number: int
    const Mask positive = x > V{};
    return slope == T(0) ? positive | (x != x) : positive;
  }
  template <class V>
  inline __attribute__((always_inline)) V low(V x) const {
    return slope == T(0) ? V{} : x * slope;
  }
  // f(x), and f'(x) d
  template <class V>
  inline __attribute__((always_inline)) V value(V x) const {
    return where(passes(x), x, low(x));
  }
  template <class V>
  inline __attribute__((always_inline)) V times_first(V x, V d) const {
    return where(passes(x), d, low(d));
  }
  // f'(x) dy_dot + f''(x) x_dot dy
  template <class V>
  inline __attribute__((always_inline)) V times_both(V x, V /* x_dot */, V /* dy */, V dy_dot) const {
    return times_first(x, dy_dot);
  }
};

FASTMAML_CPU_END
