// group norm over [N, pixels, C]; a row is one example's group. Layer norm is one group of one pixel. ALGORITHMS section 6.
#include <cmath>

#include "cpu/cpu.h"

FASTMAML_CPU_BEGIN
namespace {

struct Sizes {
  const GroupNorm& s;
  int64_t N, C, width, values;  // width: channels of a group; values: numbers of a row
  explicit Sizes(const Call& call)
      : s(*std::get_if<GroupNorm>(&call.layer)),
        N(call.step.examples),
        C(s.channels),
        width(s.channels / s.groups),
        values(width * s.spatial) {}
};

size_t sums_bytes(const Step&, const Layer& layer) { return size_t(std::get_if<GroupNorm>(&layer)->channels) * 2 * sizeof(double); }

// Q means over a row, where f(V{}, element, channel, V out[Q]) gives the values.
template <class T, int Q, class F>
inline void row_means(const Sizes& z, int64_t n, int64_t g, double* means, F f) {
  for (int q = 0; q < Q; ++q) means[q] = 0;
  for (int64_t p = 0; p < z.s.spatial; ++p) {
    const int64_t start = (n * z.s.spatial + p) * z.C + g * z.width;
    Vec<T> acc[Q] = {};
    T tail[Q] = {};
    for_lanes<T>(z.width, [&](auto lane, int64_t c) {
      using V = decltype(lane);
      V more[Q];
      f(lane, start + c, g * z.width + c, more);
      for (int q = 0; q < Q; ++q) {
        if constexpr (std::is_same_v<V, T>)
          tail[q] += more[q];
        else
          acc[q] += more[q];
      }
    });
    for (int q = 0; q < Q; ++q) means[q] += double(sum_lanes<T>(acc[q])) + double(tail[q]);
  }
  for (int q = 0; q < Q; ++q) means[q] /= double(z.values);
}

// Calls f(V{}, element, channel) along a row.
template <class T, class F>
inline void for_row(const Sizes& z, int64_t n, int64_t g, F f) {
  for (int64_t p = 0; p < z.s.spatial; ++p) {
    const int64_t start = (n * z.s.spatial + p) * z.C + g * z.width;
    for_lanes<T>(z.width, [&](auto lane, int64_t c) { f(lane, start + c, g * z.width + c); });
  }
}

template <class F>
inline void for_rows(const Sizes& z, F f) {
  for (int64_t n = 0; n < z.N; ++n)
    for (int64_t g = 0; g < z.s.groups; ++g) f(n, g, 2 * (n * z.s.groups + g));
}

template <class T>
void group_norm_fwd(const Call& call) {
  const Sizes z(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *y = at<T>(call, 0, t), *stats = at<T>(call, 1, t);
    const T *x = at<T>(call, 2, t), *gamma = at<T>(call, 3, t), *beta = at<T>(call, 4, t);
    for_rows(z, [&](int64_t n, int64_t g, int64_t at) {
      double m;
      row_means<T, 1>(z, n, g, &m, [&](auto lane, int64_t i, int64_t, auto* out) { out[0] = load<decltype(lane)>(x + i); });
      const T mean = stats[at] = T(m);
      row_means<T, 1>(z, n, g, &m, [&](auto lane, int64_t i, int64_t, auto* out) {
        const auto centred = load<decltype(lane)>(x + i) - mean;
        out[0] = centred * centred;
      });
      const T rstd = stats[at + 1] = T(1.0 / std::sqrt(m + z.s.eps));
      for_row<T>(z, n, g, [&](auto lane, int64_t i, int64_t c) {
        using V = decltype(lane);
        store(y + i, (load<V>(x + i) - mean) * rstd * load_or<V>(gamma, c, T(1)) + load_or<V>(beta, c, T(0)));
      });
    });
  }
}

template <class T>
void group_norm_fwd_jvp(const Call& call) {
  const Sizes z(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *y_dot = at<T>(call, 0, t), *stats_dot = at<T>(call, 1, t);
    const T *x = at<T>(call, 2, t), *x_dot = at<T>(call, 3, t), *stats = at<T>(call, 4, t);
    const T *gamma = at<T>(call, 5, t), *gamma_dot = at<T>(call, 6, t), *beta_dot = at<T>(call, 7, t);
    for_rows(z, [&](int64_t n, int64_t g, int64_t at) {
      const T mean = stats[at], rstd = stats[at + 1];
      double m[2] = {0, 0};
      if (x_dot)
        row_means<T, 2>(z, n, g, m, [&](auto lane, int64_t i, int64_t, auto* out) {
          using V = decltype(lane);
          out[0] = load<V>(x_dot + i);
          out[1] = out[0] * ((load<V>(x + i) - mean) * rstd);
        });
      const T mean_dot = stats_dot[at] = T(m[0]), s = stats_dot[at + 1] = T(m[1]);
      for_row<T>(z, n, g, [&](auto lane, int64_t i, int64_t c) {
        using V = decltype(lane);
        const V xhat = (load<V>(x + i) - mean) * rstd;
        V xhat_dot{};
        if (x_dot) xhat_dot = (load<V>(x_dot + i) - mean_dot - xhat * s) * rstd;
        store(y_dot + i, load_or<V>(gamma_dot, c, T(0)) * xhat + load_or<V>(gamma, c, T(1)) * xhat_dot + load_or<V>(beta_dot, c, T(0)));
      });
    });
  }
}

// h = gamma dy;  u = h - mean h - xhat mean(h xhat);  dx = r u
template <class T>
void group_norm_bwd(const Call& call) {
  const Sizes z(call);
  double* sums = static_cast<double*>(call.scratch);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *dx = at<T>(call, 0, t), *dgamma = at<T>(call, 1, t), *dbeta = at<T>(call, 2, t);
    const T *x = at<T>(call, 3, t), *dy = at<T>(call, 4, t), *stats = at<T>(call, 5, t), *gamma = at<T>(call, 6, t);
    for (int64_t i = 0; i < 2 * z.C; ++i) sums[i] = 0;
    for_rows(z, [&](int64_t n, int64_t g, int64_t at) {
      const T mean = stats[at], rstd = stats[at + 1];
      double m[2];
      row_means<T, 2>(z, n, g, m, [&](auto lane, int64_t i, int64_t c, auto* out) {
        using V = decltype(lane);
        out[0] = load_or<V>(gamma, c, T(1)) * load<V>(dy + i);
        out[1] = out[0] * ((load<V>(x + i) - mean) * rstd);
      });
      const T p = T(m[0]), q = T(m[1]);
      for_row<T>(z, n, g, [&](auto lane, int64_t i, int64_t c) {
        using V = decltype(lane);
        const V d = load<V>(dy + i), xhat = (load<V>(x + i) - mean) * rstd, d_xhat = d * xhat;
        if (dx) store(dx + i, (load_or<V>(gamma, c, T(1)) * d - p - xhat * q) * rstd);
        if constexpr (std::is_same_v<V, T>) {
          sums[c] += double(d_xhat);
          sums[z.C + c] += double(d);
        } else {
          for (int64_t l = 0; l < kLanes<T>; ++l) {
            sums[c + l] += double(d_xhat[l]);
            sums[z.C + c + l] += double(d[l]);
          }
        }
      });
    });
    for (int64_t c = 0; c < z.C; ++c) {
      dgamma[c] = T(sums[c]);
      dbeta[c] = T(sums[z.C + c]);
    }
  }
}

// u_dot = h_dot - mean h_dot - xhat_dot mean(h xhat) - xhat mean(h_dot xhat + h xhat_dot);  dx_dot = r_dot u + r u_dot, r_dot = -r^2 s
template <class T>
void group_norm_bwd_jvp(const Call& call) {
  const Sizes z(call);
  double* sums = static_cast<double*>(call.scratch);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *dx_dot = at<T>(call, 0, t), *dgamma_dot = at<T>(call, 1, t), *dbeta_dot = at<T>(call, 2, t);
    const T *x = at<T>(call, 3, t), *x_dot = at<T>(call, 4, t), *dy = at<T>(call, 5, t), *dy_dot = at<T>(call, 6, t);
    const T *stats = at<T>(call, 7, t), *stats_dot = at<T>(call, 8, t), *gamma = at<T>(call, 9, t), *gamma_dot = at<T>(call, 10, t);
    for (int64_t i = 0; i < 2 * z.C; ++i) sums[i] = 0;
    for_rows(z, [&](int64_t n, int64_t g, int64_t at) {
      const T mean = stats[at], rstd = stats[at + 1];
      const T mean_dot = stats_dot ? stats_dot[at] : T(0), s = stats_dot ? stats_dot[at + 1] : T(0);
      const auto values = [&](auto lane, int64_t i, int64_t c, auto& h, auto& h_dot, auto& xhat, auto& xhat_dot) {
        using V = decltype(lane);
        const V d = load<V>(dy + i), scale = load_or<V>(gamma, c, T(1));
        h = scale * d;
        h_dot = load_or<V>(gamma_dot, c, T(0)) * d + scale * load<V>(dy_dot + i);
        xhat = (load<V>(x + i) - mean) * rstd;
        xhat_dot = V{};
        if (x_dot) xhat_dot = (load<V>(x_dot + i) - mean_dot - xhat * s) * rstd;
      };
      double m[4];
      row_means<T, 4>(z, n, g, m, [&](auto lane, int64_t i, int64_t c, auto* out) {
        using V = decltype(lane);
        V h, h_dot, xhat, xhat_dot;
        values(lane, i, c, h, h_dot, xhat, xhat_dot);
        out[0] = h;
        out[1] = h * xhat;
        out[2] = h_dot;
        out[3] = h_dot * xhat + h * xhat_dot;
      });
      const T p = T(m[0]), q = T(m[1]), p_dot = T(m[2]), q_dot = T(m[3]), rstd_dot = -rstd * rstd * s;
      for_row<T>(z, n, g, [&](auto lane, int64_t i, int64_t c) {
        using V = decltype(lane);
        V h, h_dot, xhat, xhat_dot;
        values(lane, i, c, h, h_dot, xhat, xhat_dot);
        const V u = h - p - xhat * q, u_dot = h_dot - p_dot - xhat_dot * q - xhat * q_dot;
        if (dx_dot) store(dx_dot + i, u * rstd_dot + u_dot * rstd);
        const V d_dot = load<V>(dy_dot + i), more = d_dot * xhat + load<V>(dy + i) * xhat_dot;
        if constexpr (std::is_same_v<V, T>) {
          sums[c] += double(more);
          sums[z.C + c] += double(d_dot);
        } else {
          for (int64_t l = 0; l < kLanes<T>; ++l) {
            sums[c + l] += double(more[l]);
            sums[z.C + c + l] += double(d_dot[l]);
          }
        }
      });
    });
    for (int64_t c = 0; c < z.C; ++c) {
      dgamma_dot[c] = T(sums[c]);
      dbeta_dot[c] = T(sums[z.C + c]);
    }
  }
}

}  // namespace

template <class T>
void add_group_norm_ops(OpTable& table) {
  set_op(table, Op::group_norm_fwd, group_norm_fwd<T>);
  set_op(table, Op::group_norm_fwd_jvp, group_norm_fwd_jvp<T>);
  set_op(table, Op::group_norm_bwd, group_norm_bwd<T>, sums_bytes);
  set_op(table, Op::group_norm_bwd_jvp, group_norm_bwd_jvp<T>, sums_bytes);
}
template void add_group_norm_ops<float>(OpTable&);
template void add_group_norm_ops<double>(OpTable&);

FASTMAML_CPU_END
