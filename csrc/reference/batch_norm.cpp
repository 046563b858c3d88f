// batch_norm: xhat = (x - mean) r,  y = gamma xhat + beta,  r = 1 / sqrt(var + eps), var biased.
// x [N, spatial, C]   gamma, beta [C], absent: 1 and 0.     M = stat_examples * spatial rows give the statistics.
//   stats     [2, C] = [mean, r]                              over the first stat_examples (or frozen)
//   stats_dot [2, C] = [mean(x'), s], s = mean(xhat x')       over the same rows;  r' = -r^2 s;  absent: zero
// Mode `support`: the rows after stat_examples are a query set, normalised with its support set's statistics.
#include <cmath>

#include "reference/normalization.h"

namespace fastmaml::reference {

namespace {

// One task's rows: x [rows, C]. The first `stat_rows` give the statistics.
struct Rows {
  int64_t rows, stat_rows, C;

  explicit Rows(const Call& call)
      : rows(call.step.examples * call.shape<BatchNorm>().spatial),
        stat_rows(call.step.stat_examples * call.shape<BatchNorm>().spatial),
        C(call.shape<BatchNorm>().C) {}
};

}  // namespace

// stats = [mean, 1 / sqrt(var + eps)]
void batch_norm_stats(const Call& call) {
  const Rows shape(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real stats = real(call, 0, task), x = real(call, 1, task);
    for (int64_t c = 0; c < shape.C; ++c) {
      double mean = 0, var = 0;
      for (int64_t m = 0; m < shape.stat_rows; ++m) mean += x[m * shape.C + c];
      mean /= static_cast<double>(shape.stat_rows);
      // A second pass: E[x^2] - mean^2 cancels when |mean| >> std.
      for (int64_t m = 0; m < shape.stat_rows; ++m) var += (x[m * shape.C + c] - mean) * (x[m * shape.C + c] - mean);
      var /= static_cast<double>(shape.stat_rows);
      stats[c] = mean;
      stats[shape.C + c] = 1 / std::sqrt(var + call.shape<BatchNorm>().eps);
    }
  }
}

// stats = [mean, 1 / sqrt(var + eps)] of running statistics
void batch_norm_frozen_stats(const Call& call) {
  const BatchNorm& shape = call.shape<BatchNorm>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real stats = real(call, 0, task), mean = real(call, 1, task), var = real(call, 2, task);
    for (int64_t c = 0; c < shape.C; ++c) {
      stats[c] = mean[c];
      stats[shape.C + c] = 1 / std::sqrt(var[c] + shape.eps);
    }
  }
}

// stats_dot = [mean(x'), mean(xhat x')]
void batch_norm_stats_jvp(const Call& call) {
  const Rows shape(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real stats_dot = real(call, 0, task), x = real(call, 1, task), x_dot = real(call, 2, task);
    const Real stats = real(call, 3, task);
    for (int64_t c = 0; c < shape.C; ++c) {
      const Channel channel(stats, Real{nullptr, 1}, c, shape.C);
      double mean_dot = 0, s = 0;
      for (int64_t i = c; i < shape.stat_rows * shape.C; i += shape.C) {
        mean_dot += x_dot[i];
        s += channel.xhat(x[i]) * x_dot[i];
      }
      stats_dot[c] = mean_dot / static_cast<double>(shape.stat_rows);
      stats_dot[shape.C + c] = s / static_cast<double>(shape.stat_rows);
    }
  }
}

// y = gamma xhat + beta
void batch_norm_fwd(const Call& call) {
  const Rows shape(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), x = real(call, 1, task), stats = real(call, 2, task);
    const Real gamma = real(call, 3, task), beta = real(call, 4, task);
    for (int64_t c = 0; c < shape.C; ++c) {
      const Channel channel(stats, Real{nullptr, 1}, c, shape.C);
      for (int64_t i = c; i < shape.rows * shape.C; i += shape.C)
        y[i] = value_or(gamma, c, 1.0) * channel.xhat(x[i]) + value_or(beta, c, 0.0);
    }
  }
}

// y' = gamma' xhat + gamma xhat' + beta'
void batch_norm_fwd_jvp(const Call& call) {
  const Rows shape(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y_dot = real(call, 0, task), x = real(call, 1, task), x_dot = real(call, 2, task);
    const Real stats = real(call, 3, task), stats_dot = real(call, 4, task);
    const Real gamma = real(call, 5, task), gamma_dot = real(call, 6, task), beta_dot = real(call, 7, task);
    for (int64_t c = 0; c < shape.C; ++c) {
      const Channel channel(stats, stats_dot, c, shape.C);
      for (int64_t i = c; i < shape.rows * shape.C; i += shape.C)
        y_dot[i] = value_or(gamma_dot, c, 0.0) * channel.xhat(x[i]) +
                   value_or(gamma, c, 1.0) * channel.xhat_dot(x[i], value_or(x_dot, i, 0.0)) + value_or(beta_dot, c, 0.0);
    }
  }
}

// dgamma = sum of dy xhat,  dbeta = sum of dy:  over all rows, not only those of the statistics
void batch_norm_bwd_weight(const Call& call) {
  const Rows shape(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dgamma = real(call, 0, task), dbeta = real(call, 1, task);
    const Real x = real(call, 2, task), dy = real(call, 3, task), stats = real(call, 4, task);
    for (int64_t c = 0; c < shape.C; ++c) {
      const Channel channel(stats, Real{nullptr, 1}, c, shape.C);
      dgamma[c] = dbeta[c] = 0;
      for (int64_t i = c; i < shape.rows * shape.C; i += shape.C) {
        dgamma[c] += dy[i] * channel.xhat(x[i]);
        dbeta[c] += dy[i];
      }
    }
  }
}

// dgamma' = sum of dy' xhat + dy xhat',  dbeta' = sum of dy'
void batch_norm_bwd_weight_jvp(const Call& call) {
  const Rows shape(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dgamma_dot = real(call, 0, task), dbeta_dot = real(call, 1, task);
    const Real x = real(call, 2, task), x_dot = real(call, 3, task);
    const Real dy = real(call, 4, task), dy_dot = real(call, 5, task);
    const Real stats = real(call, 6, task), stats_dot = real(call, 7, task);
    for (int64_t c = 0; c < shape.C; ++c) {
      const Channel channel(stats, stats_dot, c, shape.C);
      dgamma_dot[c] = dbeta_dot[c] = 0;
      for (int64_t i = c; i < shape.rows * shape.C; i += shape.C) {
        dgamma_dot[c] += dy_dot[i] * channel.xhat(x[i]) + dy[i] * channel.xhat_dot(x[i], value_or(x_dot, i, 0.0));
        dbeta_dot[c] += dy_dot[i];
      }
    }
  }
}

// dx = gamma r u  with  u = dy - dbeta / M - xhat dgamma / M  in the rows that made the statistics, and u = dy in all
// others. Every row's y depends on the statistics, so dbeta and dgamma, the gradients that flow through mean and r, sum
// over all rows.
void batch_norm_bwd_data(const Call& call) {
  const Rows shape(call);
  const bool frozen = call.shape<BatchNorm>().frozen;
  const double M = static_cast<double>(shape.stat_rows);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx = real(call, 0, task), x = real(call, 1, task), dy = real(call, 2, task), stats = real(call, 3, task);
    const Real gamma = real(call, 4, task), dgamma = real(call, 5, task), dbeta = real(call, 6, task);
    for (int64_t c = 0; c < shape.C; ++c) {
      const Channel channel(stats, Real{nullptr, 1}, c, shape.C);
      for (int64_t row = 0; row < shape.rows; ++row) {
        const int64_t i = row * shape.C + c;
        double u = dy[i];
        if (!frozen && row < shape.stat_rows) u -= dbeta[c] / M + channel.xhat(x[i]) * dgamma[c] / M;
        dx[i] = value_or(gamma, c, 1.0) * channel.r * u;
      }
    }
  }
}

// dx' = (gamma' r + gamma r') u + gamma r u'  with  u' = dy' - dbeta' / M - xhat' dgamma / M - xhat dgamma' / M,  or u'
// = dy'
void batch_norm_bwd_data_jvp(const Call& call) {
  const Rows shape(call);
  const bool frozen = call.shape<BatchNorm>().frozen;
  const double M = static_cast<double>(shape.stat_rows);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx_dot = real(call, 0, task), x = real(call, 1, task), x_dot = real(call, 2, task);
    const Real dy = real(call, 3, task), dy_dot = real(call, 4, task);
    const Real stats = real(call, 5, task), stats_dot = real(call, 6, task);
    const Real gamma = real(call, 7, task), gamma_dot = real(call, 8, task);
    const Real dgamma = real(call, 9, task), dbeta = real(call, 10, task);
    const Real dgamma_dot = real(call, 11, task), dbeta_dot = real(call, 12, task);
    for (int64_t c = 0; c < shape.C; ++c) {
      const Channel channel(stats, stats_dot, c, shape.C);
      const double g = value_or(gamma, c, 1.0), g_dot = value_or(gamma_dot, c, 0.0);
      for (int64_t row = 0; row < shape.rows; ++row) {
        const int64_t i = row * shape.C + c;
        double u = dy[i], u_dot = dy_dot[i];
        if (!frozen && row < shape.stat_rows) {
          const double xhat = channel.xhat(x[i]), xhat_dot = channel.xhat_dot(x[i], value_or(x_dot, i, 0.0));
          u -= dbeta[c] / M + xhat * dgamma[c] / M;
          u_dot -= dbeta_dot[c] / M + xhat_dot * dgamma[c] / M + xhat * dgamma_dot[c] / M;
        }
        dx_dot[i] = (g_dot * channel.r + g * channel.r_dot()) * u + g * channel.r * u_dot;
      }
    }
  }
}

}  // namespace fastmaml::reference
