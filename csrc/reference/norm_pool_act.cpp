// norm_pool_act: z = gamma xhat + beta,  y = act(the largest z of a window),  act a ReLU or leaky ReLU.
// The same as batch_norm.cpp, pool2d.cpp and pointwise.cpp in a row. Without a pool the winner is x, one pixel a window.
// x [N, H, W, C]     y, tap, winner, dy [N, OH, OW, C]
#include <cmath>

#include "reference/normalization.h"
#include "reference/windows.h"

namespace fastmaml::reference {

namespace {

struct Sizes {
  const NormPoolAct& shape;
  int64_t C, N, pixels, windows;  // of all examples
  double M;                       // rows that give the statistics

  explicit Sizes(const Call& call)
      : shape(call.shape<NormPoolAct>()),
        C(shape.norm.C),
        N(call.step.examples),
        pixels(N * shape.pool.H * shape.pool.W),
        windows(N * shape.pool.OH * shape.pool.OW),
        M(static_cast<double>(call.step.stat_examples * shape.norm.spatial)) {}

  // Is act'(z) one? As in pointwise.cpp, NaN counts as positive for a ReLU.
  bool passes(double z) const { return z > 0 || (std::isnan(z) && shape.slope == 0); }
  double slope(bool passed) const { return passed ? 1 : shape.slope; }
};

double z_of(double xhat, Real gamma, Real beta, int64_t c) { return value_or(gamma, c, 1.0) * xhat + value_or(beta, c, 0.0); }

// dz = act'(z) dy of every window's winner, added into the winner's pixel. Overlapping windows add up.
void gather(const Sizes& sizes, Real dz, Tap tap, Real x, Real dy, Real stats, Real gamma, Real beta) {
  if (!tap) {
    for (int64_t i = 0; i < sizes.pixels * sizes.C; ++i) {
      const Channel channel(stats, Real{nullptr, 1}, i % sizes.C, sizes.C);
      dz[i] = sizes.slope(sizes.passes(z_of(channel.xhat(x[i]), gamma, beta, i % sizes.C))) * dy[i];
    }
    return;
  }
  fill(dz, sizes.pixels * sizes.C, 0.0);
  for_each_window(sizes.N, sizes.shape.pool, [&](int64_t out, int64_t, int64_t, auto x_of) {
    const bool passed = tap[out] >= 0;
    const int64_t at = passed ? tap[out] : ~tap[out];
    dz[x_of(at / sizes.shape.pool.KW, at % sizes.shape.pool.KW)] += sizes.slope(passed) * dy[out];
  });
}

}  // namespace

// y = act(the largest z). Torch's rules: the first in scan order wins a tie, NaN beats every number.
void norm_pool_act_fwd(const Call& call) {
  const Sizes sizes(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), winner = real(call, 2, task), x = real(call, 3, task);
    const Tap tap = elements<int8_t>(call[1], task);
    const Real stats = real(call, 4, task), gamma = real(call, 5, task), beta = real(call, 6, task);
    for_each_window(sizes.N, sizes.shape.pool, [&](int64_t out, int64_t, int64_t, auto x_of) {
      const int64_t c = out % sizes.C;
      const Channel channel(stats, Real{nullptr, 1}, c, sizes.C);
      double largest = 0, of_x = 0;
      int64_t at = -1;
      for (int64_t kh = 0; kh < sizes.shape.pool.KH; ++kh)
        for (int64_t kw = 0; kw < sizes.shape.pool.KW; ++kw) {
          const int64_t in = x_of(kh, kw);
          if (in < 0) continue;
          const double z = z_of(channel.xhat(x[in]), gamma, beta, c);
          if (at >= 0 && !(z > largest) && !std::isnan(z)) continue;
          largest = z;
          of_x = x[in];
          at = kh * sizes.shape.pool.KW + kw;
        }
      const bool passed = sizes.passes(largest);
      y[out] = passed ? largest : sizes.shape.slope == 0 ? 0 : sizes.shape.slope * largest;
      if (tap) tap[out] = static_cast<int8_t>(passed ? at : ~at);
      if (winner) winner[out] = of_x;
    });
  }
}

// y' = act'(z) (gamma' xhat + gamma xhat' + beta') of the winner
void norm_pool_act_fwd_jvp(const Call& call) {
  const Sizes sizes(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y_dot = real(call, 0, task), winner_dot = real(call, 1, task), winner = real(call, 3, task), x_dot = real(call, 4, task);
    const Tap tap = elements<int8_t>(call[2], task);
    const Real stats = real(call, 5, task), stats_dot = real(call, 6, task);
    const Real gamma = real(call, 7, task), gamma_dot = real(call, 8, task), beta = real(call, 9, task), beta_dot = real(call, 10, task);
    for_each_window(sizes.N, sizes.shape.pool, [&](int64_t out, int64_t, int64_t, auto x_of) {
      const int64_t c = out % sizes.C, at = !tap ? 0 : tap[out] >= 0 ? tap[out] : ~tap[out];
      const Channel channel(stats, stats_dot, c, sizes.C);
      const double of_x_dot = value_or(x_dot, x_of(at / sizes.shape.pool.KW, at % sizes.shape.pool.KW), 0.0);
      const double xhat = channel.xhat(winner[out]), xhat_dot = channel.xhat_dot(winner[out], of_x_dot);
      const double z_dot = value_or(gamma_dot, c, 0.0) * xhat + value_or(gamma, c, 1.0) * xhat_dot + value_or(beta_dot, c, 0.0);
      y_dot[out] = sizes.slope(sizes.passes(z_of(xhat, gamma, beta, c))) * z_dot;
      if (winner_dot) winner_dot[out] = of_x_dot;
    });
  }
}

// dgamma = sum of dz xhat,  dbeta = sum of dz  with  dz = act'(z) dy  over the winners
void norm_pool_act_bwd_weight(const Call& call) {
  const Sizes sizes(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dgamma = real(call, 0, task), dbeta = real(call, 1, task), winner = real(call, 2, task), dy = real(call, 3, task);
    const Real stats = real(call, 4, task), gamma = real(call, 5, task), beta = real(call, 6, task);
    for (int64_t c = 0; c < sizes.C; ++c) {
      const Channel channel(stats, Real{nullptr, 1}, c, sizes.C);
      dgamma[c] = dbeta[c] = 0;
      for (int64_t i = c; i < sizes.windows * sizes.C; i += sizes.C) {
        const double xhat = channel.xhat(winner[i]), dz = sizes.slope(sizes.passes(z_of(xhat, gamma, beta, c))) * dy[i];
        dgamma[c] += dz * xhat;
        dbeta[c] += dz;
      }
    }
  }
}

// dgamma' = sum of dz' xhat + dz xhat',  dbeta' = sum of dz'
void norm_pool_act_bwd_weight_jvp(const Call& call) {
  const Sizes sizes(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dgamma_dot = real(call, 0, task), dbeta_dot = real(call, 1, task);
    const Real winner = real(call, 2, task), winner_dot = real(call, 3, task), dy = real(call, 4, task), dy_dot = real(call, 5, task);
    const Real stats = real(call, 6, task), stats_dot = real(call, 7, task), gamma = real(call, 8, task), beta = real(call, 9, task);
    for (int64_t c = 0; c < sizes.C; ++c) {
      const Channel channel(stats, stats_dot, c, sizes.C);
      dgamma_dot[c] = dbeta_dot[c] = 0;
      for (int64_t i = c; i < sizes.windows * sizes.C; i += sizes.C) {
        const double xhat = channel.xhat(winner[i]), xhat_dot = channel.xhat_dot(winner[i], value_or(winner_dot, i, 0.0));
        const double slope = sizes.slope(sizes.passes(z_of(xhat, gamma, beta, c)));
        dgamma_dot[c] += slope * (dy_dot[i] * xhat + dy[i] * xhat_dot);
        dbeta_dot[c] += slope * dy_dot[i];
      }
    }
  }
}

// dx = gamma r u  with  u = dz - dbeta / M - xhat dgamma / M  in the rows that give the statistics, and u = dz in all others
void norm_pool_act_bwd_data(const Call& call) {
  const Sizes sizes(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx = real(call, 0, task), x = real(call, 2, task), dy = real(call, 3, task), stats = real(call, 4, task);
    const Real gamma = real(call, 5, task), beta = real(call, 6, task), dgamma = real(call, 7, task), dbeta = real(call, 8, task);
    gather(sizes, dx, elements<int8_t>(call[1], task), x, dy, stats, gamma, beta);
    for (int64_t i = 0; i < sizes.pixels * sizes.C; ++i) {
      const int64_t c = i % sizes.C;
      const Channel channel(stats, Real{nullptr, 1}, c, sizes.C);
      double u = dx[i];
      if (!sizes.shape.norm.frozen && static_cast<double>(i / sizes.C) < sizes.M)
        u -= dbeta[c] / sizes.M + channel.xhat(x[i]) * dgamma[c] / sizes.M;
      dx[i] = value_or(gamma, c, 1.0) * channel.r * u;
    }
  }
}

// dx' = (gamma' r + gamma r') u + gamma r u'  with  u' = dz' - dbeta' / M - xhat' dgamma / M - xhat dgamma' / M,  or u' = dz'
void norm_pool_act_bwd_data_jvp(const Call& call) {
  const Sizes sizes(call);
  std::vector<double> dz(static_cast<size_t>(sizes.pixels * sizes.C));
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx_dot = real(call, 0, task), x = real(call, 2, task), x_dot = real(call, 3, task);
    const Tap tap = elements<int8_t>(call[1], task);
    const Real dy = real(call, 4, task), dy_dot = real(call, 5, task), stats = real(call, 6, task), stats_dot = real(call, 7, task);
    const Real gamma = real(call, 8, task), gamma_dot = real(call, 9, task), beta = real(call, 10, task);
    const Real dgamma = real(call, 11, task), dbeta = real(call, 12, task);
    const Real dgamma_dot = real(call, 13, task), dbeta_dot = real(call, 14, task);
    gather(sizes, Real{dz.data(), 1}, tap, x, dy, stats, gamma, beta);
    gather(sizes, dx_dot, tap, x, dy_dot, stats, gamma, beta);
    for (int64_t i = 0; i < sizes.pixels * sizes.C; ++i) {
      const int64_t c = i % sizes.C;
      const Channel channel(stats, stats_dot, c, sizes.C);
      const double g = value_or(gamma, c, 1.0), g_dot = value_or(gamma_dot, c, 0.0);
      double u = dz[static_cast<size_t>(i)], u_dot = dx_dot[i];
      if (!sizes.shape.norm.frozen && static_cast<double>(i / sizes.C) < sizes.M) {
        const double xhat = channel.xhat(x[i]), xhat_dot = channel.xhat_dot(x[i], value_or(x_dot, i, 0.0));
        u -= dbeta[c] / sizes.M + xhat * dgamma[c] / sizes.M;
        u_dot -= dbeta_dot[c] / sizes.M + xhat_dot * dgamma[c] / sizes.M + xhat * dgamma_dot[c] / sizes.M;
      }
      dx_dot[i] = (g_dot * channel.r + g * channel.r_dot()) * u + g * channel.r * u_dot;
    }
  }
}

}  // namespace fastmaml::reference
