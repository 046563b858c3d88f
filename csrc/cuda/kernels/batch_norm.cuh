// Batch norm over x [rows, C], rows = examples x pixels; formulas in ALGORITHMS section 6.
//   stats     [3, C] = mean, r = 1 / sqrt(var + eps), and the rounding error of the mean in T. Without the third part
//                      xhat would be wrong in a channel with |mean| >> std (ALGORITHMS section 7).
//   stats_dot [2, C] = mean(x'), s = mean(xhat x')
#pragma once

#include "cuda/kernels/columns.cuh"
#include "cuda/kernels/reduce.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

// ---------------------------------------------------------------- statistics

template <class T>
__device__ __forceinline__ void write_stats(T* stats, int c, int C, double mean, double var, double eps) {
  stats[c] = T(mean);
  stats[C + c] = T(1.0 / sqrt(var + eps));
  stats[2 * C + c] = T(mean - double(stats[c]));
}

// Mean and squared deviations of a thread's rows minus `shift`: kRows at a time in two passes through registers, then merged.
template <bool kWide, int kRows, class T>
__device__ __forceinline__ int thread_moments(T (&mean)[kChunk<T>], T (&squares)[kChunk<T>], const T* x, const Chunk<T>& shift, int C,
                                              const ColumnThread<T>& t) {
  constexpr int n = kChunk<T>;
  int seen = 0;
  for (int row = t.row; row < t.end; row += kRows * t.step) {
    const int rows = min((t.end - row + t.step - 1) / t.step, kRows);
    Chunk<T> d[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (k < rows) d[k] = load<kWide, n>(x + (row + k * t.step) * C + t.c, t.count);
#pragma unroll
      for (int j = 0; j < n; ++j) d[k].at[j] = k < rows ? d[k].at[j] - shift.at[j] : T(0);
    }
    const T over = T(1) / T(rows), share = T(rows) / T(seen + rows), weight = T(seen) * share;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      T sum = T(0), more = T(0);
#pragma unroll
      for (int k = 0; k < kRows; ++k) sum += d[k].at[j];
      const T here = sum * over, difference = here - mean[j];
#pragma unroll
      for (int k = 0; k < kRows; ++k)
        if (k < rows) more += (d[k].at[j] - here) * (d[k].at[j] - here);
      mean[j] += difference * share;
      squares[j] += more + difference * difference * weight;
    }
    seen += rows;
  }
  return seen;
}

template <class T>
struct ColumnMoments {  // in shared memory
  double means[kChunk<T>][kColumnThreads], squares[kChunk<T>][kColumnThreads];
  int seen[kColumnThreads];
};

// Mean minus `shift`, and squared deviations, of the thread's part of the rows. Results are in `shared`, at threads with row_lane 0.
template <int kRows, class T>
__device__ __forceinline__ void column_moments_of_part(ColumnMoments<T>& shared, const T* x, const Chunk<T>& shift, const Columns& s,
                                                       const ColumnThread<T>& t, bool wide) {
  constexpr int n = kChunk<T>;
  auto& [means, squares, seen] = shared;
  T mean[n] = {}, square[n] = {};
  int rows = 0;
  if (wide && t.count > 0)
    rows = thread_moments<true, kRows>(mean, square, x, shift, s.C, t);
  else if (t.count > 0)
    rows = thread_moments<false, kRows>(mean, square, x, shift, s.C, t);

  seen[threadIdx.x] = rows;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    means[j][threadIdx.x] = double(mean[j]);
    squares[j][threadIdx.x] = double(square[j]);
  }
  for (int half = s.row_lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t.row_lane >= half) continue;
    const int here = threadIdx.x, there = here + half * s.lanes;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      Moments both{double(seen[here]), means[j][here], squares[j][here]};
      both.merge({double(seen[there]), means[j][there], squares[j][there]});
      means[j][here] = both.mean;
      squares[j][here] = both.squares;
    }
    seen[here] += seen[there];
  }
}

// stats of all rows. With `parts`: mean and squared deviations of each part, in double [T, parts, 2, C].
template <class T>
__global__ void __launch_bounds__(kColumnThreads)
    batch_norm_stats(PerTask<T> stats, PerTask<const T> x, double eps, double* parts, Columns s, bool wide) {
  __shared__ ColumnMoments<T> shared;
  const ColumnThread<T> t(s);
  // Subtracts the part's first row: the differences are exactly zero for a constant channel.
  const T* const first = x.of(blockIdx.x) + blockIdx.y * s.part_rows * s.C;
  const Chunk<T> shift = channels(first, t.c, t.count, T(0));
  column_moments_of_part<8>(shared, x.of(blockIdx.x), shift, s, t, wide);
  if (t.row_lane > 0) return;
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) {
    if (j >= t.count) break;
    const double whole_mean = double(shift.at[j]) + shared.means[j][threadIdx.x], squares = shared.squares[j][threadIdx.x];
    if (parts) {
      double* const to = parts + (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * 2 * s.C + t.c + j;
      to[0] = whole_mean;
      to[s.C] = squares;
    } else {
      write_stats(stats.of(blockIdx.x), t.c + j, s.C, whole_mean, squares / double(s.rows), eps);
    }
  }
}

template <class T>
__global__ void batch_norm_stats_of_parts(PerTask<T> stats, double eps, const double* parts, Columns s) {
  const int c = blockIdx.y * blockDim.x + threadIdx.x;
  if (c >= s.C) return;
  const int count = (s.rows + s.part_rows - 1) / s.part_rows;
  const double* const from = parts + int64_t(blockIdx.x) * count * 2 * s.C + c;
  Moments all;
  for (int part = 0; part < count; ++part) {
    const int rows = min(s.rows - part * s.part_rows, s.part_rows);
    all.merge({double(rows), from[int64_t(2 * part) * s.C], from[int64_t(2 * part + 1) * s.C]});
  }
  write_stats(stats.of(blockIdx.x), c, s.C, all.mean, all.squares / double(s.rows), eps);
}

// stats of running statistics
template <class T>
__global__ void batch_norm_frozen_stats(PerTask<T> stats, PerTask<const T> mean, PerTask<const T> var, double eps, int C) {
  const int c = blockIdx.y * blockDim.x + threadIdx.x;
  if (c < C) write_stats(stats.of(blockIdx.x), c, C, double(mean.of(blockIdx.x)[c]), double(var.of(blockIdx.x)[c]), eps);
}

// ---------------------------------------------------------------- a thread's channels

template <class T>
struct Normalization {
  Chunk<T> mean, rest, r;

  __device__ Normalization(const T* stats, int c, int count, int C)
      : mean(channels(stats, c, count, T(0))), rest(channels(stats + 2 * C, c, count, T(0))), r(channels(stats + C, c, count, T(0))) {}

  __device__ T xhat(T x, int j) const { return ((x - mean.at[j]) - rest.at[j]) * r.at[j]; }
};

// The tangent of a thread's channels. Frozen statistics have none.
template <class T>
struct NormalizationDot {
  Chunk<T> mean, s;

  __device__ NormalizationDot(const T* stats_dot, int c, int count, int C)
      : mean(channels(stats_dot, c, count, T(0))), s(channels(stats_dot ? stats_dot + C : nullptr, c, count, T(0))) {}

  __device__ T xhat_dot(T xhat, T x_dot, T r, int j) const { return r * (x_dot - mean.at[j] - xhat * s.at[j]); }
};

template <bool kWide, class T>
__device__ __forceinline__ Chunk<T> load_or_zeros(const T* of_task, int i, int count) {
  if (of_task) return load<kWide, kChunk<T>>(of_task + i, count);
  return {};
}

// ---------------------------------------------------------------- sums over rows (kernels/columns.cuh)

// x', xhat x'
template <class T>
struct BatchNormStatsJvp {
  PerTask<const T> x, x_dot, stats;
  int C;

  struct Channels {
    const T *x, *x_dot;
    int C, c, count;
    Normalization<T> norm;
    __device__ Channels(const BatchNormStatsJvp& f, int64_t task, int c, int count)
        : x(f.x.of(task)), x_dot(f.x_dot.of(task)), C(f.C), c(c), count(count), norm(f.stats.of(task), c, count, f.C) {}

    template <bool kWide>
    __device__ void add(T (&sum)[2][kChunk<T>], int row) const {
      const int i = row * C + c;
      const Chunk<T> x_here = load<kWide, kChunk<T>>(x + i, count), x_dot_here = load<kWide, kChunk<T>>(x_dot + i, count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        sum[0][j] += x_dot_here.at[j];
        sum[1][j] += norm.xhat(x_here.at[j], j) * x_dot_here.at[j];
      }
    }
  };
};

// dgamma = dy xhat,  dbeta = dy
template <class T>
struct BatchNormBwdWeight {
  PerTask<const T> x, dy, stats;
  int C;

  struct Channels {
    const T *x, *dy;
    int C, c, count;
    Normalization<T> norm;
    __device__ Channels(const BatchNormBwdWeight& f, int64_t task, int c, int count)
        : x(f.x.of(task)), dy(f.dy.of(task)), C(f.C), c(c), count(count), norm(f.stats.of(task), c, count, f.C) {}

    template <bool kWide>
    __device__ void add(T (&sum)[2][kChunk<T>], int row) const {
      const int i = row * C + c;
      const Chunk<T> x_here = load<kWide, kChunk<T>>(x + i, count), d = load<kWide, kChunk<T>>(dy + i, count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        sum[0][j] += d.at[j] * norm.xhat(x_here.at[j], j);
        sum[1][j] += d.at[j];
      }
    }
  };
};

// dgamma' = dy' xhat + dy xhat',  dbeta' = dy'
template <class T>
struct BatchNormBwdWeightJvp {
  PerTask<const T> x, x_dot, dy, dy_dot, stats, stats_dot;
  int C;

  struct Channels {
    const T *x, *x_dot, *dy, *dy_dot;
    int C, c, count;
    Normalization<T> norm;
    NormalizationDot<T> dot;
    __device__ Channels(const BatchNormBwdWeightJvp& f, int64_t task, int c, int count)
        : x(f.x.of(task)),
          x_dot(f.x_dot.of(task)),
          dy(f.dy.of(task)),
          dy_dot(f.dy_dot.of(task)),
          C(f.C),
          c(c),
          count(count),
          norm(f.stats.of(task), c, count, f.C),
          dot(f.stats_dot.of(task), c, count, f.C) {}

    template <bool kWide>
    __device__ void add(T (&sum)[2][kChunk<T>], int row) const {
      const int i = row * C + c;
      const Chunk<T> x_here = load<kWide, kChunk<T>>(x + i, count), x_dot_here = load_or_zeros<kWide>(x_dot, i, count);
      const Chunk<T> d = load<kWide, kChunk<T>>(dy + i, count), d_dot = load<kWide, kChunk<T>>(dy_dot + i, count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const T xhat = norm.xhat(x_here.at[j], j);
        sum[0][j] += d_dot.at[j] * xhat + d.at[j] * dot.xhat_dot(xhat, x_dot_here.at[j], norm.r.at[j], j);
        sum[1][j] += d_dot.at[j];
      }
    }
  };
};

// ---------------------------------------------------------------- maps (kernels/columns.cuh)

// y = gamma xhat + beta
template <class T>
struct BatchNormFwd {
  PerTask<T> y;
  PerTask<const T> x, stats, gamma, beta;
  int C;

  template <bool kWide>
  __device__ void run(int64_t task, const ColumnThread<T>& t) const {
    const Normalization<T> norm(stats.of(task), t.c, t.count, C);
    const Chunk<T> g = channels(gamma.of(task), t.c, t.count, T(1)), b = channels(beta.of(task), t.c, t.count, T(0));
    const T* const from = x.of(task);
    T* const to = y.of(task);
    for (int row = t.row; row < t.end; row += t.step) {
      const int i = row * C + t.c;
      Chunk<T> out = load<kWide, kChunk<T>>(from + i, t.count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) out.at[j] = norm.xhat(out.at[j], j) * g.at[j] + b.at[j];
      store<kWide>(to + i, out, t.count);
    }
  }
};

// y' = gamma' xhat + gamma xhat' + beta'
template <class T>
struct BatchNormFwdJvp {
  PerTask<T> y_dot;
  PerTask<const T> x, x_dot, stats, stats_dot, gamma, gamma_dot, beta_dot;
  int C;

  template <bool kWide>
  __device__ void run(int64_t task, const ColumnThread<T>& t) const {
    const Normalization<T> norm(stats.of(task), t.c, t.count, C);
    const NormalizationDot<T> dot(stats_dot.of(task), t.c, t.count, C);
    const Chunk<T> g = channels(gamma.of(task), t.c, t.count, T(1)), g_dot = channels(gamma_dot.of(task), t.c, t.count, T(0)),
                   b_dot = channels(beta_dot.of(task), t.c, t.count, T(0));
    const T *const x_of = x.of(task), *const x_dot_of = x_dot.of(task);
    T* const to = y_dot.of(task);
    for (int row = t.row; row < t.end; row += t.step) {
      const int i = row * C + t.c;
      const Chunk<T> x_here = load<kWide, kChunk<T>>(x_of + i, t.count), x_dot_here = load_or_zeros<kWide>(x_dot_of, i, t.count);
      Chunk<T> out;
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const T xhat = norm.xhat(x_here.at[j], j), xhat_dot = dot.xhat_dot(xhat, x_dot_here.at[j], norm.r.at[j], j);
        out.at[j] = g_dot.at[j] * xhat + g.at[j] * xhat_dot + b_dot.at[j];
      }
      store<kWide>(to + i, out, t.count);
    }
  }
};

// dx = gamma r u. The first M = inside_rows rows give the statistics: u = dy - dbeta / M - xhat dgamma / M. Later rows: u = dy.
template <class T>
struct BatchNormBwdData {
  PerTask<T> dx;
  PerTask<const T> x, dy, stats, gamma, dgamma, dbeta;
  int C, inside_rows;
  T over;  // 1 / M

  template <bool kWide>
  __device__ void run(int64_t task, const ColumnThread<T>& t) const {
    const Normalization<T> norm(stats.of(task), t.c, t.count, C);
    const Chunk<T> g = channels(gamma.of(task), t.c, t.count, T(1));
    const Chunk<T> p = channels(dbeta.of(task), t.c, t.count, T(0)), q = channels(dgamma.of(task), t.c, t.count, T(0));
    const T *const x_of = x.of(task), *const dy_of = dy.of(task);
    T* const to = dx.of(task);
    for (int row = t.row; row < t.end; row += t.step) {
      const int i = row * C + t.c;
      const Chunk<T> d = load<kWide, kChunk<T>>(dy_of + i, t.count);
      Chunk<T> out;
      if (row < inside_rows) {
        const Chunk<T> x_here = load<kWide, kChunk<T>>(x_of + i, t.count);
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) out.at[j] = d.at[j] - p.at[j] * over - norm.xhat(x_here.at[j], j) * (q.at[j] * over);
      } else {
        out = d;
      }
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) out.at[j] *= g.at[j] * norm.r.at[j];
      store<kWide>(to + i, out, t.count);
    }
  }
};

// dx' = (gamma' r + gamma r') u + gamma r u'  with  u' = dy' - dbeta' / M - xhat' dgamma / M - xhat dgamma' / M  and  r' = -r^2 s
template <class T>
struct BatchNormBwdDataJvp {
  PerTask<T> dx_dot;
  PerTask<const T> x, x_dot, dy, dy_dot, stats, stats_dot, gamma, gamma_dot, dgamma, dbeta, dgamma_dot, dbeta_dot;
  int C, inside_rows;
  T over;

  template <bool kWide>
  __device__ void run(int64_t task, const ColumnThread<T>& t) const {
    const Normalization<T> norm(stats.of(task), t.c, t.count, C);
    const NormalizationDot<T> dot(stats_dot.of(task), t.c, t.count, C);
    const Chunk<T> g = channels(gamma.of(task), t.c, t.count, T(1)), g_dot = channels(gamma_dot.of(task), t.c, t.count, T(0));
    Chunk<T> p = channels(dbeta.of(task), t.c, t.count, T(0)), q = channels(dgamma.of(task), t.c, t.count, T(0));
    Chunk<T> p_dot = channels(dbeta_dot.of(task), t.c, t.count, T(0)), q_dot = channels(dgamma_dot.of(task), t.c, t.count, T(0));
    Chunk<T> factor, factor_dot;
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      factor.at[j] = g.at[j] * norm.r.at[j];
      factor_dot.at[j] = g_dot.at[j] * norm.r.at[j] - factor.at[j] * norm.r.at[j] * dot.s.at[j];
      p.at[j] *= over;
      q.at[j] *= over;
      p_dot.at[j] *= over;
      q_dot.at[j] *= over;
    }
    const T *const x_of = x.of(task), *const x_dot_of = x_dot.of(task), *const dy_of = dy.of(task), *const dy_dot_of = dy_dot.of(task);
    T* const to = dx_dot.of(task);
    for (int row = t.row; row < t.end; row += t.step) {
      const int i = row * C + t.c;
      Chunk<T> u = load<kWide, kChunk<T>>(dy_of + i, t.count), u_dot = load<kWide, kChunk<T>>(dy_dot_of + i, t.count);
      if (row < inside_rows) {
        const Chunk<T> x_here = load<kWide, kChunk<T>>(x_of + i, t.count), x_dot_here = load_or_zeros<kWide>(x_dot_of, i, t.count);
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) {
          const T xhat = norm.xhat(x_here.at[j], j), xhat_dot = dot.xhat_dot(xhat, x_dot_here.at[j], norm.r.at[j], j);
          u.at[j] = u.at[j] - p.at[j] - xhat * q.at[j];
          u_dot.at[j] = u_dot.at[j] - p_dot.at[j] - xhat_dot * q.at[j] - xhat * q_dot.at[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) u_dot.at[j] = factor_dot.at[j] * u.at[j] + factor.at[j] * u_dot.at[j];
      store<kWide>(to + i, u_dot, t.count);
    }
  }
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
