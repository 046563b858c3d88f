// gamma xhat + beta for batch_norm and norm_pool_act. Every pass uses the same instructions, so all see the same masks.
#pragma once

#include "cpu/cpu.h"
#include "cpu/vec_math.h"

FASTMAML_CPU_BEGIN

// stats = [mean, r = 1 / std, rest]: `rest` is the rounding error of the mean in T. xhat = r ((x - mean) - rest).
// Without `rest`, xhat would be wrong in a channel with |mean| >> std (ALGORITHMS section 7).
// stats_dot = [mean(x_dot), s = mean(xhat x_dot)], absent: zero.
template <class T>
struct Stats {
  const T *stats, *dot;
  int64_t C;

  const T* mean() const { return stats; }
  const T* rstd() const { return stats + C; }
  template <class V>
  V centred(const T* x, int64_t i, int64_t c) const {
    return (load<V>(x + i) - load<V>(stats + c)) - load<V>(stats + 2 * C + c);
  }
  double r(int64_t c) const { return double(stats[C + c]); }
  double rest(int64_t c) const { return double(stats[2 * C + c]); }
  double mean_dot(int64_t c) const { return dot ? double(dot[c]) : 0; }
  double s(int64_t c) const { return dot ? double(dot[C + c]) : 0; }
};

template <class T>
Stats<T> stats_of(const Call& call, int stats, int stats_dot, int64_t t, int64_t C) {
  return {at<T>(call, stats, t), stats_dot < 0 ? nullptr : at<T>(call, stats_dot, t), C};
}

template <class T>
inline double value_or(const T* p, int64_t c, double otherwise) {
  return p ? double(p[c]) : otherwise;
}

// z = gamma xhat + beta as a line in x - mean, which is exact for x near the mean.
// Two numbers for each channel, made in double, hold the rest, including the mean's rounding error.
template <class T>
struct Affine {
  const T* mean;
  T *scale, *shift;

  Affine(const Stats<T>& stats, const T* gamma, const T* beta, Scratch& scratch)
      : mean(stats.mean()), scale(scratch.take<T>(stats.C)), shift(scratch.take<T>(stats.C)) {
    for (int64_t c = 0; c < stats.C; ++c) {
      const double by_x = value_or(gamma, c, 1) * stats.r(c);
      scale[c] = T(by_x);
      shift[c] = T(value_or(beta, c, 0) - by_x * stats.rest(c));
    }
  }

  template <class V>
  struct Channels {
    V mean, scale, shift;
    V z_of_centred(V x) const { return multiply_add(x, scale, shift); }
    V z(V x) const { return z_of_centred(x - mean); }
  };
  template <class V>
  Channels<V> at(int64_t c) const {
    return {load<V>(mean + c), load<V>(scale + c), load<V>(shift + c)};
  }
};

FASTMAML_CPU_END
