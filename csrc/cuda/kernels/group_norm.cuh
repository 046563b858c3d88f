// Group norm over x [N, spatial, channels]; layer norm is one group of one pixel. Formulas in ALGORITHMS section 6.
//   stats     [N, groups, 2] = mean, r = 1 / sqrt(var + eps)          stats_dot [N, groups, 2] = mean(x'), s = mean(xhat x')
#pragma once

#include "cuda/kernels/columns.cuh"
#include "cuda/kernels/rectifier.cuh"
#include "cuda/kernels/reduce.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

struct Groups {
  int N, spatial, channels, groups;
  int width;   // channels of a group
  int chunks;  // chunks of one pixel of a group

  __device__ int count() const { return N * groups; }
};

// A team of threads (kernels/reduce.cuh) takes one group of one example at a time.
// Calls body(i, c, count) for its chunks: place in x, first channel, number of channels.
template <class T, class Team, class Body>
__device__ __forceinline__ void for_group(const Groups& s, int group, Body body) {
  const int first = group % s.groups * s.width, start = group / s.groups * s.spatial * s.channels + first;
  for (int q = Team::rank(); q < s.spatial * s.chunks; q += Team::size()) {
    const int pixel = q / s.chunks, c = q % s.chunks * kChunk<T>;
    body(start + pixel * s.channels + c, first + c, min(s.width - c, kChunk<T>));
  }
}

// The rectifier that made y, or none. Masks a gradient by y into the gradient by the rectifier's argument.
template <class T>
struct Mask {
  PerTask<const T> y = {};
  Rectifier<T> act = {T(0)};

  template <bool kWide, class... Chunks>
  __device__ __forceinline__ void apply(const T* y_of, int i, int count, Chunks&... d) const {
    if (!y_of) return;
    const Chunk<T> sign = load<kWide, kChunk<T>>(y_of + i, count);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) ((d.at[j] = act.times_first(sign.at[j], d.at[j])), ...);
  }
};

template <class T>
struct GroupNormFwd {
  PerTask<T> y, stats;
  PerTask<const T> x, gamma, beta;
  double eps;
  bool rectified = false;
  Rectifier<T> act = {T(0)};

  // Chunks go in two passes through registers. A thread merges its chunks in T; threads are merged in double.
  template <class Team, bool kWide>
  __device__ Moments moments(const T* x, const Groups& s, int group) const {
    const T shift = x[group / s.groups * s.spatial * s.channels + group % s.groups * s.width];
    int seen = 0;
    T mean = T(0), squares = T(0);
    for_group<T, Team>(s, group, [&](int i, int, int count) {
      Chunk<T> d = load<kWide, kChunk<T>>(x + i, count);
      T sum = T(0), more = T(0);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        d.at[j] = j < count ? d.at[j] - shift : T(0);
        sum += d.at[j];
      }
      const T here = sum / T(count), difference = here - mean, share = T(count) / T(seen + count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j)
        if (j < count) more += (d.at[j] - here) * (d.at[j] - here);
      mean += difference * share;
      squares += more + difference * difference * (T(seen) * share);
      seen += count;
    });
    Moments all = Team::moments({double(seen), double(mean), double(squares)});
    all.mean += double(shift);
    return all;
  }

  template <class Team, bool kWide>
  __device__ void run(int64_t task, const Groups& s, int group) const {
    const Moments m = moments<Team, kWide>(x.of(task), s, group);
    const T mean = T(m.mean), r = T(1.0 / sqrt(m.squares / m.n + eps));
    if (Team::rank() == 0) {
      stats.of(task)[2 * group] = mean;
      stats.of(task)[2 * group + 1] = r;
    }
    for_group<T, Team>(s, group, [&](int i, int c, int count) {
      Chunk<T> out = load<kWide, kChunk<T>>(x.of(task) + i, count);
      const Chunk<T> g = channels(gamma.of(task), c, count, T(1)), b = channels(beta.of(task), c, count, T(0));
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) out.at[j] = (out.at[j] - mean) * r * g.at[j] + b.at[j];
      if (rectified) {
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) out.at[j] = act.value(out.at[j]);
      }
      store<kWide>(y.of(task) + i, out, count);
    });
  }
};

// xhat' = r (x' - mean(x') - xhat s),  y' = gamma' xhat + gamma xhat' + beta'
template <class T>
struct GroupNormFwdJvp {
  PerTask<T> y_dot, stats_dot;
  PerTask<const T> x, x_dot, stats, gamma, gamma_dot, beta_dot;
  Mask<T> mask = {};

  template <class Team, bool kWide>
  __device__ void run(int64_t task, const Groups& s, int group) const {
    const T mean = stats.of(task)[2 * group], r = stats.of(task)[2 * group + 1];
    const T *const x_of = x.of(task), *const x_dot_of = x_dot.of(task);
    double sums[2] = {0, 0};
    if (x_dot_of) {
      for_group<T, Team>(s, group, [&](int i, int, int count) {
        const Chunk<T> x_here = load<kWide, kChunk<T>>(x_of + i, count), x_dot_here = load<kWide, kChunk<T>>(x_dot_of + i, count);
        T sum[2] = {};
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) {
          sum[0] += x_dot_here.at[j];
          sum[1] += x_dot_here.at[j] * ((x_here.at[j] - mean) * r);
        }
        sums[0] += double(sum[0]);
        sums[1] += double(sum[1]);
      });
      Team::sum(sums);
    }
    const double size = double(s.spatial) * s.width;
    const T mean_dot = T(sums[0] / size), slope = T(sums[1] / size);
    if (Team::rank() == 0) {
      stats_dot.of(task)[2 * group] = mean_dot;
      stats_dot.of(task)[2 * group + 1] = slope;
    }
    for_group<T, Team>(s, group, [&](int i, int c, int count) {
      Chunk<T> out = load<kWide, kChunk<T>>(x_of + i, count), x_dot_here = {};
      if (x_dot_of) x_dot_here = load<kWide, kChunk<T>>(x_dot_of + i, count);
      const Chunk<T> g = channels(gamma.of(task), c, count, T(1)), g_dot = channels(gamma_dot.of(task), c, count, T(0)),
                     b_dot = channels(beta_dot.of(task), c, count, T(0));
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const T xhat = (out.at[j] - mean) * r, xhat_dot = r * (x_dot_here.at[j] - mean_dot - xhat * slope);
        out.at[j] = g_dot.at[j] * xhat + g.at[j] * xhat_dot + b_dot.at[j];
      }
      mask.template apply<kWide>(mask.y.of(task), i, count, out);
      store<kWide>(y_dot.of(task) + i, out, count);
    });
  }
};

// With h = gamma dy:  dx = r u,  u = h - mean(h) - xhat mean(h xhat)
template <class T>
struct GroupNormBwdData {
  PerTask<T> dx;
  PerTask<const T> x, dy, stats, gamma;
  Mask<T> mask = {};

  template <class Team, bool kWide>
  __device__ void run(int64_t task, const Groups& s, int group) const {
    const T mean = stats.of(task)[2 * group], r = stats.of(task)[2 * group + 1];
    const auto values = [&](Chunk<T>& h, Chunk<T>& xhat, int i, int c, int count) {
      h = load<kWide, kChunk<T>>(dy.of(task) + i, count);
      mask.template apply<kWide>(mask.y.of(task), i, count, h);
      xhat = load<kWide, kChunk<T>>(x.of(task) + i, count);
      const Chunk<T> g = channels(gamma.of(task), c, count, T(1));
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        h.at[j] *= g.at[j];
        xhat.at[j] = (xhat.at[j] - mean) * r;
      }
    };
    double sums[2] = {0, 0};
    for_group<T, Team>(s, group, [&](int i, int c, int count) {
      Chunk<T> h, xhat;
      values(h, xhat, i, c, count);
      T sum[2] = {};
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        sum[0] += h.at[j];
        sum[1] += h.at[j] * xhat.at[j];
      }
      sums[0] += double(sum[0]);
      sums[1] += double(sum[1]);
    });
    Team::sum(sums);
    const double size = double(s.spatial) * s.width;
    const T p = T(sums[0] / size), q = T(sums[1] / size);
    for_group<T, Team>(s, group, [&](int i, int c, int count) {
      Chunk<T> h, xhat;
      values(h, xhat, i, c, count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) h.at[j] = (h.at[j] - p - xhat.at[j] * q) * r;
      store<kWide>(dx.of(task) + i, h, count);
    });
  }
};

// With h' = gamma' dy + gamma dy':  dx' = r' u + r u',  r' = -r^2 s,
//   u' = h' - mean(h') - xhat' mean(h xhat) - xhat mean(h' xhat + h xhat')
template <class T>
struct GroupNormBwdDataJvp {
  PerTask<T> dx_dot;
  PerTask<const T> x, x_dot, dy, dy_dot, stats, stats_dot, gamma, gamma_dot;
  Mask<T> mask = {};

  template <class Team, bool kWide>
  __device__ void run(int64_t task, const Groups& s, int group) const {
    const T mean = stats.of(task)[2 * group], r = stats.of(task)[2 * group + 1];
    const T* const dot = stats_dot.of(task);
    const T mean_dot = dot ? dot[2 * group] : T(0), slope = dot ? dot[2 * group + 1] : T(0);
    const auto values = [&](Chunk<T>& h, Chunk<T>& h_dot, Chunk<T>& xhat, Chunk<T>& xhat_dot, int i, int c, int count) {
      h = load<kWide, kChunk<T>>(dy.of(task) + i, count);
      h_dot = load<kWide, kChunk<T>>(dy_dot.of(task) + i, count);
      mask.template apply<kWide>(mask.y.of(task), i, count, h, h_dot);
      xhat = load<kWide, kChunk<T>>(x.of(task) + i, count);
      xhat_dot = {};
      if (x_dot.data) xhat_dot = load<kWide, kChunk<T>>(x_dot.of(task) + i, count);
      const Chunk<T> g = channels(gamma.of(task), c, count, T(1)), g_dot = channels(gamma_dot.of(task), c, count, T(0));
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        h_dot.at[j] = g_dot.at[j] * h.at[j] + g.at[j] * h_dot.at[j];
        h.at[j] *= g.at[j];
        xhat.at[j] = (xhat.at[j] - mean) * r;
        xhat_dot.at[j] = r * (xhat_dot.at[j] - mean_dot - xhat.at[j] * slope);
      }
    };
    double sums[4] = {0, 0, 0, 0};
    for_group<T, Team>(s, group, [&](int i, int c, int count) {
      Chunk<T> h, h_dot, xhat, xhat_dot;
      values(h, h_dot, xhat, xhat_dot, i, c, count);
      T sum[4] = {};
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        sum[0] += h.at[j];
        sum[1] += h.at[j] * xhat.at[j];
        sum[2] += h_dot.at[j];
        sum[3] += h_dot.at[j] * xhat.at[j] + h.at[j] * xhat_dot.at[j];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] += double(sum[k]);
    });
    Team::sum(sums);
    const double size = double(s.spatial) * s.width;
    const T p = T(sums[0] / size), q = T(sums[1] / size), p_dot = T(sums[2] / size), q_dot = T(sums[3] / size), r_dot = -r * r * slope;
    for_group<T, Team>(s, group, [&](int i, int c, int count) {
      Chunk<T> h, h_dot, xhat, xhat_dot;
      values(h, h_dot, xhat, xhat_dot, i, c, count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const T u = h.at[j] - p - xhat.at[j] * q, u_dot = h_dot.at[j] - p_dot - xhat_dot.at[j] * q - xhat.at[j] * q_dot;
        h.at[j] = u * r_dot + u_dot * r;
      }
      store<kWide>(dx_dot.of(task) + i, h, count);
    });
  }
};

template <class F>
__global__ void __launch_bounds__(256) map_groups(F f, Groups s, bool wide) {
  for (int group = blockIdx.y; group < s.count(); group += gridDim.y) {
    if (wide)
      f.template run<BlockTeam, true>(blockIdx.x, s, group);
    else
      f.template run<BlockTeam, false>(blockIdx.x, s, group);
  }
}

// ---------------------------------------------------------------- sums over the rows [N spatial, channels] (kernels/columns.cuh)

// The groups of a thread's channels c .. c + count - 1. Channels after them hold zeros and count for the last group.
template <int n>
struct ChannelGroups {
  int of[n];
  __device__ ChannelGroups(const Groups& s, int c, int count) {
#pragma unroll
    for (int j = 0; j < n; ++j) of[j] = (c + (j < count ? j : count - 1)) / s.width;
  }
};

// dgamma = dy xhat,  dbeta = dy
template <class T>
struct GroupNormBwdWeight {
  PerTask<const T> x, dy, stats;
  Groups s;
  Mask<T> mask = {};

  struct Channels {
    const GroupNormBwdWeight& f;
    const T *x, *dy, *stats, *y;
    int c, count;
    ChannelGroups<kChunk<T>> groups;
    __device__ Channels(const GroupNormBwdWeight& f, int64_t task, int c, int count)
        : f(f),
          x(f.x.of(task)),
          dy(f.dy.of(task)),
          stats(f.stats.of(task)),
          y(f.mask.y.of(task)),
          c(c),
          count(count),
          groups(f.s, c, count) {}

    template <bool kWide>
    __device__ void add(T (&sum)[2][kChunk<T>], int row) const {
      const int i = row * f.s.channels + c, first = row / f.s.spatial * f.s.groups;
      const Chunk<T> x_here = load<kWide, kChunk<T>>(x + i, count);
      Chunk<T> d = load<kWide, kChunk<T>>(dy + i, count);
      f.mask.template apply<kWide>(y, i, count, d);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const int group = first + groups.of[j];
        sum[0][j] += d.at[j] * ((x_here.at[j] - stats[2 * group]) * stats[2 * group + 1]);
        sum[1][j] += d.at[j];
      }
    }
  };
};

// dgamma' = dy' xhat + dy xhat',  dbeta' = dy'
template <class T>
struct GroupNormBwdWeightJvp {
  PerTask<const T> x, x_dot, dy, dy_dot, stats, stats_dot;
  Groups s;
  Mask<T> mask = {};

  struct Channels {
    const GroupNormBwdWeightJvp& f;
    const T *x, *x_dot, *dy, *dy_dot, *stats, *stats_dot, *y;
    int c, count;
    ChannelGroups<kChunk<T>> groups;
    __device__ Channels(const GroupNormBwdWeightJvp& f, int64_t task, int c, int count)
        : f(f),
          x(f.x.of(task)),
          x_dot(f.x_dot.of(task)),
          dy(f.dy.of(task)),
          dy_dot(f.dy_dot.of(task)),
          stats(f.stats.of(task)),
          stats_dot(f.stats_dot.of(task)),
          y(f.mask.y.of(task)),
          c(c),
          count(count),
          groups(f.s, c, count) {}

    template <bool kWide>
    __device__ void add(T (&sum)[2][kChunk<T>], int row) const {
      const int i = row * f.s.channels + c, first = row / f.s.spatial * f.s.groups;
      const Chunk<T> x_here = load<kWide, kChunk<T>>(x + i, count);
      Chunk<T> d = load<kWide, kChunk<T>>(dy + i, count), d_dot = load<kWide, kChunk<T>>(dy_dot + i, count);
      f.mask.template apply<kWide>(y, i, count, d, d_dot);
      Chunk<T> x_dot_here = {};
      if (x_dot) x_dot_here = load<kWide, kChunk<T>>(x_dot + i, count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const int group = first + groups.of[j];
        const T r = stats[2 * group + 1], xhat = (x_here.at[j] - stats[2 * group]) * r;
        const T mean_dot = stats_dot ? stats_dot[2 * group] : T(0), slope = stats_dot ? stats_dot[2 * group + 1] : T(0);
        sum[0][j] += d_dot.at[j] * xhat + d.at[j] * (r * (x_dot_here.at[j] - mean_dot - xhat * slope));
        sum[1][j] += d_dot.at[j];
      }
    }
  };
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
