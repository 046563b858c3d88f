// batch norm over [rows, C], rows = examples x pixels; formulas in ALGORITHMS section 6.
// The variance comes from deviations. A sum of squares would cancel when |mean| >> std.
#include <cmath>

#include "cpu/kernels/normalization.h"

FASTMAML_CPU_BEGIN
namespace {

struct Sizes {
  const BatchNorm& s;
  int64_t C, rows, stat_rows;
  explicit Sizes(const Call& call)
      : s(*std::get_if<BatchNorm>(&call.layer)),
        C(s.C),
        rows(call.step.examples * s.spatial),
        stat_rows(call.step.stat_examples * s.spatial) {}
};

template <class T>
void set_stats(T* stats, int64_t c, int64_t C, double mean, double var, double eps) {
  stats[c] = T(mean);
  stats[C + c] = T(1.0 / std::sqrt(var + eps));
  stats[2 * C + c] = T(mean - double(stats[c]));
}

size_t sums_bytes(const Step&, const Layer& layer) { return size_t(std::get_if<BatchNorm>(&layer)->C) * 2 * sizeof(double); }

size_t affine_bytes(const Step&, const Layer& layer) {
  Scratch scratch(nullptr);
  for (int i = 0; i < 2; ++i) scratch.take<double>(std::get_if<BatchNorm>(&layer)->C);
  return scratch.used();
}

// The mean and the squared deviations of x minus its first row, which is exactly zero for a constant channel.
// Each tile is read twice, the second time from L1, so x is read from memory once. Chan's formula merges the tiles.
template <class T>
void moments(const T* x, int64_t rows, int64_t C, double* means, double* squares) {
  for (int64_t c = 0; c < C; ++c) means[c] = squares[c] = 0;
  T sum[1][kSumColumns], square[1][kSumColumns], mean[kSumColumns];
  for_tiles(rows, C, [&](int64_t from, int64_t to, int64_t first, int64_t columns) {
    const double count = double(to - from), seen = double(from), over = 1.0 / count;
    tile_sums<T, 1>(from, to, first, columns, sum, [&](auto lane, int64_t r, int64_t c, auto* out) {
      out[0] = load<decltype(lane)>(x + r * C + c) - load<decltype(lane)>(x + c);
    });
    for (int64_t c = 0; c < columns; ++c) mean[c] = T(double(sum[0][c]) * over);
    tile_sums<T, 1>(from, to, first, columns, square, [&](auto lane, int64_t r, int64_t c, auto* out) {
      using V = decltype(lane);
      const V d = (load<V>(x + r * C + c) - load<V>(x + c)) - load<V>(mean + (c - first));
      out[0] = d * d;
    });
    const double share = count / (seen + count), weight = seen * share;
    for (int64_t c = 0; c < columns; ++c) {
      const double difference = double(sum[0][c]) * over - means[first + c];
      means[first + c] += difference * share;
      squares[first + c] += double(square[0][c]) + difference * difference * weight;
    }
  });
}

template <class T>
void batch_norm_stats(const Call& call) {
  const Sizes z(call);
  double *means = static_cast<double*>(call.scratch), *squares = means + z.C;
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* stats = at<T>(call, 0, t);
    const T* x = at<T>(call, 1, t);
    moments(x, z.stat_rows, z.C, means, squares);
    for (int64_t c = 0; c < z.C; ++c) set_stats(stats, c, z.C, double(x[c]) + means[c], squares[c] / double(z.stat_rows), z.s.eps);
  }
}

template <class T>
void batch_norm_frozen_stats(const Call& call) {
  const Sizes z(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* stats = at<T>(call, 0, t);
    const T *running_mean = at<T>(call, 1, t), *running_var = at<T>(call, 2, t);
    for (int64_t c = 0; c < z.C; ++c) set_stats(stats, c, z.C, double(running_mean[c]), double(running_var[c]), z.s.eps);
  }
}

// stats_dot = [mean(x_dot), mean(xhat x_dot)]
template <class T>
void batch_norm_stats_jvp(const Call& call) {
  const Sizes z(call);
  double* sums = static_cast<double*>(call.scratch);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* stats_dot = at<T>(call, 0, t);
    const T *x = at<T>(call, 1, t), *x_dot = at<T>(call, 2, t);
    const Stats<T> stats = stats_of<T>(call, 3, -1, t, z.C);
    column_sums<T, 2>(z.stat_rows, z.C, sums, [&](auto lane, int64_t r, int64_t c, auto* sum) {
      using V = decltype(lane);
      const V v = load<V>(x_dot + r * z.C + c);
      sum[0] = v;
      sum[1] = stats.template centred<V>(x, r * z.C + c, c) * load<V>(stats.rstd() + c) * v;
    });
    for (int64_t i = 0; i < 2 * z.C; ++i) stats_dot[i] = T(sums[i] / double(z.stat_rows));
  }
}

template <class T>
void batch_norm_fwd(const Call& call) {
  const Sizes z(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    Scratch scratch(call.scratch);
    T* y = at<T>(call, 0, t);
    const T* x = at<T>(call, 1, t);
    const Affine<T> affine(stats_of<T>(call, 2, -1, t, z.C), at<T>(call, 3, t), at<T>(call, 4, t), scratch);
    for (int64_t r = 0; r < z.rows; ++r)
      for_lanes<T>(z.C, [&](auto lane, int64_t c) {
        using V = decltype(lane);
        store(y + r * z.C + c, affine.template at<V>(c).z(load<V>(x + r * z.C + c)));
      });
  }
}

// xhat_dot = r (x_dot - mean(x_dot) - xhat s), s = mean(xhat x_dot). Frozen statistics have no tangent.
template <class V, class T>
inline __attribute__((always_inline)) V xhat_tangent(V xhat, const T* x_dot, int64_t i, V rstd, const T* stats_dot, int64_t c, int64_t C) {
  if (!x_dot) return V{};
  const V v = load<V>(x_dot + i);
  return stats_dot ? rstd * (v - load<V>(stats_dot + c) - xhat * load<V>(stats_dot + C + c)) : rstd * v;
}

template <class T>
void batch_norm_fwd_jvp(const Call& call) {
  const Sizes z(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* y_dot = at<T>(call, 0, t);
    const T *x = at<T>(call, 1, t), *x_dot = at<T>(call, 2, t), *stats_dot = at<T>(call, 4, t);
    const Stats<T> stats = stats_of<T>(call, 3, -1, t, z.C);
    const T *gamma = at<T>(call, 5, t), *gamma_dot = at<T>(call, 6, t), *beta_dot = at<T>(call, 7, t);
    for (int64_t r = 0; r < z.rows; ++r)
      for_lanes<T>(z.C, [&](auto lane, int64_t c) {
        using V = decltype(lane);
        const V scale = load<V>(stats.rstd() + c), xhat = stats.template centred<V>(x, r * z.C + c, c) * scale;
        const V xhat_dot = xhat_tangent<V>(xhat, x_dot, r * z.C + c, scale, stats_dot, c, z.C);
        store(y_dot + r * z.C + c,
              load_or<V>(gamma_dot, c, T(0)) * xhat + load_or<V>(gamma, c, T(1)) * xhat_dot + load_or<V>(beta_dot, c, T(0)));
      });
  }
}

template <class T>
void batch_norm_bwd_weight(const Call& call) {
  const Sizes z(call);
  double* sums = static_cast<double*>(call.scratch);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *dgamma = at<T>(call, 0, t), *dbeta = at<T>(call, 1, t);
    const T *x = at<T>(call, 2, t), *dy = at<T>(call, 3, t);
    const Stats<T> stats = stats_of<T>(call, 4, -1, t, z.C);
    column_sums<T, 2>(z.rows, z.C, sums, [&](auto lane, int64_t r, int64_t c, auto* sum) {
      using V = decltype(lane);
      const V d = load<V>(dy + r * z.C + c);
      sum[0] = d * (stats.template centred<V>(x, r * z.C + c, c) * load<V>(stats.rstd() + c));
      sum[1] = d;
    });
    for (int64_t c = 0; c < z.C; ++c) {
      dgamma[c] = T(sums[c]);
      dbeta[c] = T(sums[z.C + c]);
    }
  }
}

template <class T>
void batch_norm_bwd_weight_jvp(const Call& call) {
  const Sizes z(call);
  double* sums = static_cast<double*>(call.scratch);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *dgamma_dot = at<T>(call, 0, t), *dbeta_dot = at<T>(call, 1, t);
    const T *x = at<T>(call, 2, t), *x_dot = at<T>(call, 3, t), *dy = at<T>(call, 4, t), *dy_dot = at<T>(call, 5, t);
    const T* stats_dot = at<T>(call, 7, t);
    const Stats<T> stats = stats_of<T>(call, 6, -1, t, z.C);
    column_sums<T, 2>(z.rows, z.C, sums, [&](auto lane, int64_t r, int64_t c, auto* sum) {
      using V = decltype(lane);
      const int64_t i = r * z.C + c;
      const V scale = load<V>(stats.rstd() + c), xhat = stats.template centred<V>(x, i, c) * scale;
      const V d_dot = load<V>(dy_dot + i);
      sum[0] = d_dot * xhat + load<V>(dy + i) * xhat_tangent<V>(xhat, x_dot, i, scale, stats_dot, c, z.C);
      sum[1] = d_dot;
    });
    for (int64_t c = 0; c < z.C; ++c) {
      dgamma_dot[c] = T(sums[c]);
      dbeta_dot[c] = T(sums[z.C + c]);
    }
  }
}

// Rows that give the statistics: dx = gamma r (dy - p - xhat q), p = dbeta / M, q = dgamma / M.
// Other rows, and frozen statistics: dx = gamma r dy.
template <class T>
void batch_norm_bwd_data(const Call& call) {
  const Sizes z(call);
  const T over = T(1.0 / double(z.stat_rows));
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* dx = at<T>(call, 0, t);
    const T *x = at<T>(call, 1, t), *dy = at<T>(call, 2, t), *gamma = at<T>(call, 4, t);
    const Stats<T> stats = stats_of<T>(call, 3, -1, t, z.C);
    const T *dgamma = at<T>(call, 5, t), *dbeta = at<T>(call, 6, t);
    for (int64_t r = 0; r < z.rows; ++r) {
      const bool inside = !z.s.frozen && r < z.stat_rows;
      for_lanes<T>(z.C, [&](auto lane, int64_t c) {
        using V = decltype(lane);
        const int64_t i = r * z.C + c;
        const V scale = load<V>(stats.rstd() + c);
        V u = load<V>(dy + i);
        if (inside) {
          const V xhat = stats.template centred<V>(x, i, c) * scale;
          u = u - load<V>(dbeta + c) * over - xhat * (load<V>(dgamma + c) * over);
        }
        store(dx + i, load_or<V>(gamma, c, T(1)) * scale * u);
      });
    }
  }
}

// dx_dot = (gamma_dot r + gamma r_dot) u + gamma r u_dot with r_dot = -r^2 s
template <class T>
void batch_norm_bwd_data_jvp(const Call& call) {
  const Sizes z(call);
  const T over = T(1.0 / double(z.stat_rows));
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* dx_dot = at<T>(call, 0, t);
    const T *x = at<T>(call, 1, t), *x_dot = at<T>(call, 2, t), *dy = at<T>(call, 3, t), *dy_dot = at<T>(call, 4, t);
    const T *stats_dot = at<T>(call, 6, t), *gamma = at<T>(call, 7, t), *gamma_dot = at<T>(call, 8, t);
    const Stats<T> stats = stats_of<T>(call, 5, -1, t, z.C);
    const T *dgamma = at<T>(call, 9, t), *dbeta = at<T>(call, 10, t), *dgamma_dot = at<T>(call, 11, t), *dbeta_dot = at<T>(call, 12, t);
    for (int64_t r = 0; r < z.rows; ++r) {
      const bool inside = !z.s.frozen && r < z.stat_rows;
      for_lanes<T>(z.C, [&](auto lane, int64_t c) {
        using V = decltype(lane);
        const int64_t i = r * z.C + c;
        const V scale = load<V>(stats.rstd() + c), g = load_or<V>(gamma, c, T(1));
        V u = load<V>(dy + i), u_dot = load<V>(dy_dot + i);
        if (inside) {
          const V xhat = stats.template centred<V>(x, i, c) * scale, q = load<V>(dgamma + c) * over;
          const V xhat_dot = xhat_tangent<V>(xhat, x_dot, i, scale, stats_dot, c, z.C);
          u = u - load<V>(dbeta + c) * over - xhat * q;
          u_dot = u_dot - load<V>(dbeta_dot + c) * over - xhat_dot * q - xhat * (load<V>(dgamma_dot + c) * over);
        }
        V factor_dot = load_or<V>(gamma_dot, c, T(0)) * scale;
        if (stats_dot) factor_dot = factor_dot - g * scale * scale * load<V>(stats_dot + z.C + c);
        store(dx_dot + i, factor_dot * u + g * scale * u_dot);
      });
    }
  }
}

}  // namespace

template <class T>
void add_batch_norm_ops(OpTable& table) {
  set_op(table, Op::batch_norm_stats, batch_norm_stats<T>, sums_bytes);
  set_op(table, Op::batch_norm_frozen_stats, batch_norm_frozen_stats<T>);
  set_op(table, Op::batch_norm_stats_jvp, batch_norm_stats_jvp<T>, sums_bytes);
  set_op(table, Op::batch_norm_fwd, batch_norm_fwd<T>, affine_bytes);
  set_op(table, Op::batch_norm_fwd_jvp, batch_norm_fwd_jvp<T>);
  set_op(table, Op::batch_norm_bwd_weight, batch_norm_bwd_weight<T>, sums_bytes);
  set_op(table, Op::batch_norm_bwd_weight_jvp, batch_norm_bwd_weight_jvp<T>, sums_bytes);
  set_op(table, Op::batch_norm_bwd_data, batch_norm_bwd_data<T>);
  set_op(table, Op::batch_norm_bwd_data_jvp, batch_norm_bwd_data_jvp<T>);
}
template void add_batch_norm_ops<float>(OpTable&);
template void add_batch_norm_ops<double>(OpTable&);

FASTMAML_CPU_END
