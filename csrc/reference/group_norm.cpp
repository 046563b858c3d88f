// group_norm (layer_norm is one group): xhat = (x - mean) r,  y = gamma xhat + beta,  r = 1 / sqrt(var + eps), var biased.
// x [N, spatial, channels]   gamma, beta [channels], absent: 1 and 0.
// Means run over a group: all pixels of one example, and channels / groups neighbouring channels.
//   stats     [N, groups, 2] = [mean, r]
//   stats_dot [N, groups, 2] = [mean(x'), s], s = mean(xhat x');  r' = -r^2 s;  absent: zero
#include <cmath>

#include "reference/reference.h"

namespace fastmaml::reference {

namespace {

// The groups of all examples, numbered n * groups + g.
struct Groups {
  int64_t count;  // N groups
  int64_t spatial, channels, groups;
  double size;  // elements in a group
  const Rectified act;

  explicit Groups(const Call& call) : act(call.shape<GroupNorm>().y) {
    const GroupNorm& shape = call.shape<GroupNorm>();
    spatial = shape.spatial;
    channels = shape.channels;
    groups = shape.groups;
    count = call.step.examples * groups;
    size = static_cast<double>(spatial * (channels / groups));
  }

  // Calls body(i, c) for every element of one group: its place in x and its channel.
  template <class Body>
  void for_each(int64_t group, Body body) const {
    const int64_t n = group / groups, width = channels / groups, first = group % groups * width;
    for (int64_t pixel = 0; pixel < spatial; ++pixel)
      for (int64_t c = first; c < first + width; ++c) body((n * spatial + pixel) * channels + c, c);
  }

  // d[i], masked by the rectifier that made y if there is one: the gradient (or tangent) by the rectifier's argument.
  double masked(const Real& d, const Real& y, int64_t i) const { return y ? rectified(act.slope, y[i], d[i]) : d[i]; }

  // The mean over one group of value(i, c).
  template <class Value>
  double mean(int64_t group, Value value) const {
    double sum = 0;
    for_each(group, [&](int64_t i, int64_t c) { sum += value(i, c); });
    return sum / size;
  }
};

}  // namespace

// stats = [mean, 1 / sqrt(var + eps)],  y = gamma xhat + beta
void group_norm_fwd(const Call& call) {
  const Groups shape(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), stats = real(call, 1, task), x = real(call, 2, task);
    const Real gamma = real(call, 3, task), beta = real(call, 4, task);
    for (int64_t group = 0; group < shape.count; ++group) {
      const double mean = shape.mean(group, [&](int64_t i, int64_t) { return x[i]; });
      const double var = shape.mean(group, [&](int64_t i, int64_t) { return (x[i] - mean) * (x[i] - mean); });
      const double r = 1 / std::sqrt(var + call.shape<GroupNorm>().eps);
      shape.for_each(group, [&](int64_t i, int64_t c) {
        y[i] = value_or(gamma, c, 1.0) * (x[i] - mean) * r + value_or(beta, c, 0.0);
        if (shape.act.on) y[i] = rectified(shape.act.slope, y[i], y[i]);
      });
      stats[2 * group] = mean;
      stats[2 * group + 1] = r;
    }
  }
}

// xhat' = r (x' - mean(x') - xhat s),  y' = gamma' xhat + gamma xhat' + beta'
void group_norm_fwd_jvp(const Call& call) {
  const Groups shape(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y_dot = real(call, 0, task), stats_dot = real(call, 1, task), x = real(call, 2, task), x_dot = real(call, 3, task);
    const Real stats = real(call, 4, task);
    const Real gamma = real(call, 5, task), gamma_dot = real(call, 6, task), beta_dot = real(call, 7, task);
    const Real y = real(call, 8, task);
    for (int64_t group = 0; group < shape.count; ++group) {
      const double mean = stats[2 * group], r = stats[2 * group + 1];
      auto xhat = [&](int64_t i) { return (x[i] - mean) * r; };
      const double mean_dot = shape.mean(group, [&](int64_t i, int64_t) { return value_or(x_dot, i, 0.0); });
      const double s = shape.mean(group, [&](int64_t i, int64_t) { return xhat(i) * value_or(x_dot, i, 0.0); });
      shape.for_each(group, [&](int64_t i, int64_t c) {
        const double xhat_dot = r * (value_or(x_dot, i, 0.0) - mean_dot - xhat(i) * s);
        y_dot[i] = value_or(gamma_dot, c, 0.0) * xhat(i) + value_or(gamma, c, 1.0) * xhat_dot + value_or(beta_dot, c, 0.0);
        if (y) y_dot[i] = rectified(shape.act.slope, y[i], y_dot[i]);
      });
      stats_dot[2 * group] = mean_dot;
      stats_dot[2 * group + 1] = s;
    }
  }
}

// With h = gamma dy:  dx = r u,  u = h - mean(h) - xhat mean(h xhat);   dgamma = sum of dy xhat,  dbeta = sum of dy
void group_norm_bwd(const Call& call) {
  const Groups shape(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx = real(call, 0, task), dgamma = real(call, 1, task), dbeta = real(call, 2, task);
    const Real x = real(call, 3, task), dy_of = real(call, 4, task), stats = real(call, 5, task), gamma = real(call, 6, task);
    const Real y = real(call, 7, task);
    auto dy = [&](int64_t i) { return shape.masked(dy_of, y, i); };
    fill(dgamma, shape.channels, 0.0);
    fill(dbeta, shape.channels, 0.0);
    for (int64_t group = 0; group < shape.count; ++group) {
      const double mean = stats[2 * group], r = stats[2 * group + 1];
      auto xhat = [&](int64_t i) { return (x[i] - mean) * r; };
      auto h = [&](int64_t i, int64_t c) { return value_or(gamma, c, 1.0) * dy(i); };
      const double mean_h = shape.mean(group, h);
      const double mean_h_xhat = shape.mean(group, [&](int64_t i, int64_t c) { return h(i, c) * xhat(i); });
      shape.for_each(group, [&](int64_t i, int64_t c) {
        dgamma[c] += dy(i) * xhat(i);
        dbeta[c] += dy(i);
        if (dx) dx[i] = r * (h(i, c) - mean_h - xhat(i) * mean_h_xhat);
      });
    }
  }
}

// With h' = gamma' dy + gamma dy':  dx' = r' u + r u',  u' = h' - mean(h') - xhat' mean(h xhat) - xhat mean(h' xhat + h xhat');
// dgamma' = sum of dy' xhat + dy xhat',  dbeta' = sum of dy'
void group_norm_bwd_jvp(const Call& call) {
  const Groups shape(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx_dot = real(call, 0, task), dgamma_dot = real(call, 1, task), dbeta_dot = real(call, 2, task);
    const Real x = real(call, 3, task), x_dot = real(call, 4, task), dy_of = real(call, 5, task), dy_dot_of = real(call, 6, task);
    const Real stats = real(call, 7, task), stats_dot = real(call, 8, task);
    const Real gamma = real(call, 9, task), gamma_dot = real(call, 10, task), y = real(call, 11, task);
    auto dy = [&](int64_t i) { return shape.masked(dy_of, y, i); };
    auto dy_dot = [&](int64_t i) { return shape.masked(dy_dot_of, y, i); };
    fill(dgamma_dot, shape.channels, 0.0);
    fill(dbeta_dot, shape.channels, 0.0);
    for (int64_t group = 0; group < shape.count; ++group) {
      const double mean = stats[2 * group], r = stats[2 * group + 1];
      const double mean_dot = value_or(stats_dot, 2 * group, 0.0), s = value_or(stats_dot, 2 * group + 1, 0.0), r_dot = -r * r * s;
      auto xhat = [&](int64_t i) { return (x[i] - mean) * r; };
      auto xhat_dot = [&](int64_t i) { return r * (value_or(x_dot, i, 0.0) - mean_dot - xhat(i) * s); };
      auto h = [&](int64_t i, int64_t c) { return value_or(gamma, c, 1.0) * dy(i); };
      auto h_dot = [&](int64_t i, int64_t c) { return value_or(gamma_dot, c, 0.0) * dy(i) + value_or(gamma, c, 1.0) * dy_dot(i); };
      const double mean_h = shape.mean(group, h);
      const double mean_h_dot = shape.mean(group, h_dot);
      const double mean_h_xhat = shape.mean(group, [&](int64_t i, int64_t c) { return h(i, c) * xhat(i); });
      const double mean_h_xhat_dot = shape.mean(group, [&](int64_t i, int64_t c) { return h_dot(i, c) * xhat(i) + h(i, c) * xhat_dot(i); });
      shape.for_each(group, [&](int64_t i, int64_t c) {
        dgamma_dot[c] += dy_dot(i) * xhat(i) + dy(i) * xhat_dot(i);
        dbeta_dot[c] += dy_dot(i);
        if (!dx_dot) return;
        const double u = h(i, c) - mean_h - xhat(i) * mean_h_xhat;
        const double u_dot = h_dot(i, c) - mean_h_dot - xhat_dot(i) * mean_h_xhat - xhat(i) * mean_h_xhat_dot;
        dx_dot[i] = r_dot * u + r * u_dot;
      });
    }
  }
}

}  // namespace fastmaml::reference
