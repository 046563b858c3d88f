// xhat of one channel, for batch_norm and norm_pool_act.
#pragma once

#include "reference/reference.h"

namespace fastmaml::reference {

// The normalisation of one channel, and its tangent.
struct Channel {
  double mean, r, mean_dot, s;

  Channel(Real stats, Real stats_dot, int64_t c, int64_t C)
      : mean(stats[c]), r(stats[C + c]), mean_dot(value_or(stats_dot, c, 0.0)), s(value_or(stats_dot, C + c, 0.0)) {}

  double r_dot() const { return -r * r * s; }
  double xhat(double x) const { return (x - mean) * r; }
  double xhat_dot(double x, double x_dot) const { return r * (x_dot - mean_dot - xhat(x) * s); }
};

}  // namespace fastmaml::reference
