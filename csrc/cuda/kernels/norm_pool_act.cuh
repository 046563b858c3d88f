// Batch norm, max-pool and ReLU or leaky ReLU as one op: z = gamma xhat + beta, y = act(the largest z of a window).
//   x [N, H, W, C]   y, winner, tap, dy [N, OH, OW, C]; winner and tap as in program/op.h
// z and its gradient dz are never in memory.
// A thread has a chunk of channels and several rows (kernels/columns.cuh): windows, or pixels if windows overlap.
// kSide: 1: no pool, the window is the pixel; 2: windows of 2 x 2; 0: any windows.
#pragma once

#include "cuda/kernels/batch_norm.cuh"
#include "cuda/kernels/pointwise.cuh"
#include "cuda/kernels/pool2d.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

using Tap = signed char;

// ---------------------------------------------------------------- a thread's channels, a thread's window

template <class T>
struct NormAct {
  Normalization<T> norm;
  Chunk<T> gamma, beta;
  Rectifier<T> act;

  __device__ NormAct(const T* stats, const T* gamma, const T* beta, Rectifier<T> act, int c, int count, int C)
      : norm(stats, c, count, C), gamma(channels(gamma, c, count, T(1))), beta(channels(beta, c, count, T(0))), act(act) {}

  // fma, and not a * b + c that may be contracted or not: all passes need the same bits for the same winner and mask.
  __device__ T z(T xhat, int j) const { return fma(xhat, gamma.at[j], beta.at[j]); }
};

__device__ __forceinline__ int place_of(Tap tap) { return tap < 0 ? ~int(tap) : int(tap); }

// Calls body(tap, offset in x) for the taps of a window inside the image.
template <int kSide, class T, class Body>
__device__ __forceinline__ void for_window_taps(const PoolSizes& s, const PoolThread<T>& t, Body body) {
  if constexpr (kSide == 0) {
    for_taps(s, t, body);
  } else {
    const int h0 = t.h * s.stride_h - s.pad_h, w0 = t.w * s.stride_w - s.pad_w;
#pragma unroll
    for (int tap = 0; tap < kSide * kSide; ++tap) {
      const int h = h0 + tap / kSide, w = w0 + tap % kSide;
      if (h >= 0 && h < s.H && w >= 0 && w < s.W) body(tap, t.at(h, w, s.H, s.W, s.C));
    }
  }
}

// ---------------------------------------------------------------- forward

// Torch's rules: the first in scan order wins a tie, NaN beats every number.
template <class T, int kSide>
struct NormPoolActFwd {
  PerTask<T> y;
  PerTask<Tap> tap;
  PerTask<T> winner;
  PerTask<const T> x, stats, gamma, beta;
  Rectifier<T> act;
  PoolSizes s;

  template <bool kWide>
  __device__ void run(int64_t task, const ColumnThread<T>& t) const {
    constexpr int n = kChunk<T>;
    const NormAct<T> f(stats.of(task), gamma.of(task), beta.of(task), act, t.c, t.count, s.C);
    const T* const from = x.of(task);
    for (int row = t.row; row < t.end; row += t.step) {
      const int i = row * s.C + t.c;
      Chunk<T> best = {}, of_x = {};
      if constexpr (kSide == 1) {
        of_x = load<kWide, n>(from + i, t.count);
#pragma unroll
        for (int j = 0; j < n; ++j) best.at[j] = f.z(f.norm.xhat(of_x.at[j], j), j);
      } else {
        int at[n];
#pragma unroll
        for (int j = 0; j < n; ++j) at[j] = -1;
        for_window_taps<kSide>(s, PoolThread<T>(row, s.OH, s.OW, t.c, t.count), [&](int here, int of_tap) {
          const Chunk<T> v = load<kWide, n>(from + of_tap, t.count);
#pragma unroll
          for (int j = 0; j < n; ++j) {
            const T z = f.z(f.norm.xhat(v.at[j], j), j);
            if (at[j] < 0 || z > best.at[j] || z != z) {
              best.at[j] = z;
              of_x.at[j] = v.at[j];
              at[j] = here;
            }
          }
        });
        Chunk<Tap, n> taps;
#pragma unroll
        for (int j = 0; j < n; ++j) taps.at[j] = Tap(act.passes(best.at[j]) ? at[j] : ~at[j]);
        store<kWide>(tap.of(task) + i, taps, t.count);
        store<kWide>(winner.of(task) + i, of_x, t.count);
      }
#pragma unroll
      for (int j = 0; j < n; ++j) best.at[j] = act.value(best.at[j]);
      store<kWide>(y.of(task) + i, best, t.count);
    }
  }
};

// y' = act'(z) (gamma' xhat + gamma xhat' + beta') of the winner. winner_dot keeps the winner's x'.
template <class T, int kSide>
struct NormPoolActFwdJvp {
  PerTask<T> y_dot, winner_dot;
  PerTask<const Tap> tap;
  PerTask<const T> winner, x_dot, stats, stats_dot, gamma, gamma_dot, beta, beta_dot;
  Rectifier<T> act;
  PoolSizes s;

  template <bool kWide>
  __device__ void run(int64_t task, const ColumnThread<T>& t) const {
    const NormAct<T> f(stats.of(task), gamma.of(task), beta.of(task), act, t.c, t.count, s.C);
    const NormalizationDot<T> dot(stats_dot.of(task), t.c, t.count, s.C);
    const Chunk<T> g_dot = channels(gamma_dot.of(task), t.c, t.count, T(0)), b_dot = channels(beta_dot.of(task), t.c, t.count, T(0));
    for (int row = t.row; row < t.end; row += t.step) {
      const int i = row * s.C + t.c;
      const Chunk<T> x_here = load<kWide, kChunk<T>>(winner.of(task) + i, t.count), x_dot_here = tangent<kWide>(task, t, row, i);
      Chunk<T> out;
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const T xhat = f.norm.xhat(x_here.at[j], j), xhat_dot = dot.xhat_dot(xhat, x_dot_here.at[j], f.norm.r.at[j], j);
        out.at[j] = act.times_first(f.z(xhat, j), g_dot.at[j] * xhat + f.gamma.at[j] * xhat_dot + b_dot.at[j]);
      }
      store<kWide>(y_dot.of(task) + i, out, t.count);
    }
  }

 private:
  template <bool kWide>
  __device__ Chunk<T> tangent(int64_t task, const ColumnThread<T>& t, int row, int i) const {
    if constexpr (kSide == 1) return load_or_zeros<kWide>(x_dot.of(task), i, t.count);
    Chunk<T> picked = {};
    if (!x_dot.data) return picked;
    const int KW = kSide ? kSide : s.KW;
    const PoolThread<T> p(row, s.OH, s.OW, t.c, t.count);
    const int h0 = p.h * s.stride_h - s.pad_h, w0 = p.w * s.stride_w - s.pad_w;
    const Chunk<Tap, kChunk<T>> taps = load<kWide, kChunk<T>>(tap.of(task) + i, t.count);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      const int at = place_of(taps.at[j]);
      if (j < t.count) picked.at[j] = x_dot.of(task)[p.at(h0 + at / KW, w0 + at % KW, s.H, s.W, s.C) + j];
    }
    store<kWide>(winner_dot.of(task) + i, picked, t.count);
    return picked;
  }
};

// ---------------------------------------------------------------- gamma and beta: sums over the winners

// dgamma = dz xhat,  dbeta = dz  with  dz = act'(z) dy
template <class T>
struct NormPoolActBwdWeight {
  PerTask<const T> winner, dy, stats, gamma, beta;
  Rectifier<T> act;
  int C;

  struct Channels {
    const T *winner, *dy;
    int C, c, count;
    NormAct<T> f;
    __device__ Channels(const NormPoolActBwdWeight& of, int64_t task, int c, int count)
        : winner(of.winner.of(task)),
          dy(of.dy.of(task)),
          C(of.C),
          c(c),
          count(count),
          f(of.stats.of(task), of.gamma.of(task), of.beta.of(task), of.act, c, count, of.C) {}

    template <bool kWide>
    __device__ void add(T (&sum)[2][kChunk<T>], int row) const {
      const int i = row * C + c;
      const Chunk<T> x = load<kWide, kChunk<T>>(winner + i, count), d = load<kWide, kChunk<T>>(dy + i, count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const T xhat = f.norm.xhat(x.at[j], j), dz = f.act.times_first(f.z(xhat, j), d.at[j]);
        sum[0][j] += dz * xhat;
        sum[1][j] += dz;
      }
    }
  };
};

// dgamma' = dz' xhat + dz xhat',  dbeta' = dz'
template <class T>
struct NormPoolActBwdWeightJvp {
  PerTask<const T> winner, winner_dot, dy, dy_dot, stats, stats_dot, gamma, beta;
  Rectifier<T> act;
  int C;

  struct Channels {
    const T *winner, *winner_dot, *dy, *dy_dot;
    int C, c, count;
    NormAct<T> f;
    NormalizationDot<T> dot;
    __device__ Channels(const NormPoolActBwdWeightJvp& of, int64_t task, int c, int count)
        : winner(of.winner.of(task)),
          winner_dot(of.winner_dot.of(task)),
          dy(of.dy.of(task)),
          dy_dot(of.dy_dot.of(task)),
          C(of.C),
          c(c),
          count(count),
          f(of.stats.of(task), of.gamma.of(task), of.beta.of(task), of.act, c, count, of.C),
          dot(of.stats_dot.of(task), c, count, of.C) {}

    template <bool kWide>
    __device__ void add(T (&sum)[2][kChunk<T>], int row) const {
      const int i = row * C + c;
      const Chunk<T> x = load<kWide, kChunk<T>>(winner + i, count), x_dot = load_or_zeros<kWide>(winner_dot, i, count);
      const Chunk<T> d = load<kWide, kChunk<T>>(dy + i, count), d_dot = load<kWide, kChunk<T>>(dy_dot + i, count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const T xhat = f.norm.xhat(x.at[j], j), xhat_dot = dot.xhat_dot(xhat, x_dot.at[j], f.norm.r.at[j], j), z = f.z(xhat, j);
        const T dz_dot = f.act.times_first(z, d_dot.at[j]);
        sum[0][j] += dz_dot * xhat + f.act.times_first(z, d.at[j]) * xhat_dot;
        sum[1][j] += dz_dot;
      }
    }
  };
};

// ---------------------------------------------------------------- x: one pixel

// F::Channels(f, task, c, count) has
//   template <bool kWide, bool kMasks> void write(int i, Chunk<T> (&dz)[F::kGradients], int count) const,
// which turns dz of the pixel at i (and its tangent, if F has one) into dx. kMasks: `dz` is still dy, not yet masked.

// dx = gamma r u. The first `inside` numbers give the statistics: u = dz - dbeta / M - xhat dgamma / M. Later ones: u = dz.
template <class T>
struct NormPoolActBwdData {
  static constexpr int kGradients = 1;
  PerTask<T> dx;
  PerTask<const T> x, dy[1], stats, gamma, beta, dgamma, dbeta;
  Rectifier<T> act;
  int C, inside;
  T over;  // 1 / M

  struct Channels {
    T* dx;
    const T* x;
    NormAct<T> f;
    int inside;
    Chunk<T> p, q;
    __device__ Channels(const NormPoolActBwdData& of, int64_t task, int c, int count)
        : dx(of.dx.of(task)),
          x(of.x.of(task)),
          f(of.stats.of(task), of.gamma.of(task), of.beta.of(task), of.act, c, count, of.C),
          inside(of.inside),
          p(channels(of.dbeta.of(task), c, count, T(0))),
          q(channels(of.dgamma.of(task), c, count, T(0))) {
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        p.at[j] *= of.over;
        q.at[j] *= of.over;
      }
    }

    template <bool kWide, bool kMasks>
    __device__ void write(int i, Chunk<T> (&dz)[1], int count) const {
      Chunk<T>& u = dz[0];
      if (kMasks || i < inside) {
        const Chunk<T> x_here = load<kWide, kChunk<T>>(x + i, count);
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) {
          const T xhat = f.norm.xhat(x_here.at[j], j);
          if (kMasks) u.at[j] = f.act.times_first(f.z(xhat, j), u.at[j]);
          if (i < inside) u.at[j] = u.at[j] - p.at[j] - xhat * q.at[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) u.at[j] *= f.gamma.at[j] * f.norm.r.at[j];
      store<kWide>(dx + i, u, count);
    }
  };
};

// dx' = (gamma' r + gamma r') u + gamma r u'  with  u' = dz' - dbeta' / M - xhat' dgamma / M - xhat dgamma' / M  and  r' = -r^2 s
template <class T>
struct NormPoolActBwdDataJvp {
  static constexpr int kGradients = 2;
  PerTask<T> dx_dot;
  PerTask<const T> x, x_dot, dy[2], stats, stats_dot, gamma, gamma_dot, beta, dgamma, dbeta, dgamma_dot, dbeta_dot;
  Rectifier<T> act;
  int C, inside;
  T over;

  struct Channels {
    T* dx_dot;
    const T *x, *x_dot;
    NormAct<T> f;
    NormalizationDot<T> dot;
    int inside;
    Chunk<T> p, q, p_dot, q_dot, factor, factor_dot;
    __device__ Channels(const NormPoolActBwdDataJvp& of, int64_t task, int c, int count)
        : dx_dot(of.dx_dot.of(task)),
          x(of.x.of(task)),
          x_dot(of.x_dot.of(task)),
          f(of.stats.of(task), of.gamma.of(task), of.beta.of(task), of.act, c, count, of.C),
          dot(of.stats_dot.of(task), c, count, of.C),
          inside(of.inside),
          p(channels(of.dbeta.of(task), c, count, T(0))),
          q(channels(of.dgamma.of(task), c, count, T(0))),
          p_dot(channels(of.dbeta_dot.of(task), c, count, T(0))),
          q_dot(channels(of.dgamma_dot.of(task), c, count, T(0))) {
      const Chunk<T> g_dot = channels(of.gamma_dot.of(task), c, count, T(0));
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const T r = f.norm.r.at[j];
        factor.at[j] = f.gamma.at[j] * r;
        factor_dot.at[j] = g_dot.at[j] * r - factor.at[j] * r * dot.s.at[j];
        p.at[j] *= of.over;
        q.at[j] *= of.over;
        p_dot.at[j] *= of.over;
        q_dot.at[j] *= of.over;
      }
    }

    template <bool kWide, bool kMasks>
    __device__ void write(int i, Chunk<T> (&dz)[2], int count) const {
      Chunk<T>&u = dz[0], &u_dot = dz[1];
      if (kMasks || i < inside) {
        const Chunk<T> x_here = load<kWide, kChunk<T>>(x + i, count);
        const Chunk<T> x_dot_here = i < inside ? load_or_zeros<kWide>(x_dot, i, count) : Chunk<T>{};
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) {
          const T xhat = f.norm.xhat(x_here.at[j], j);
          if (kMasks) {
            const T z = f.z(xhat, j);
            u.at[j] = f.act.times_first(z, u.at[j]);
            u_dot.at[j] = f.act.times_first(z, u_dot.at[j]);
          }
          if (i < inside) {
            const T xhat_dot = dot.xhat_dot(xhat, x_dot_here.at[j], f.norm.r.at[j], j);
            u.at[j] = u.at[j] - p.at[j] - xhat * q.at[j];
            u_dot.at[j] = u_dot.at[j] - p_dot.at[j] - xhat_dot * q.at[j] - xhat * q_dot.at[j];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) u_dot.at[j] = factor_dot.at[j] * u.at[j] + factor.at[j] * u_dot.at[j];
      store<kWide>(dx_dot + i, u_dot, count);
    }
  };
};

// ---------------------------------------------------------------- x: all pixels

// Adjacent windows (stride = kernel, no padding), or no pool: a thread reads its window's dy and tap once and writes all its pixels.
// Windows past the last one cover the rest of the image. These pixels affect y only through the statistics.
template <class T, class F, int kSide>
struct NormPoolActBwdTiles {
  F f;
  PerTask<const Tap> tap;
  PoolSizes s;

  template <bool kWide>
  __device__ void run(int64_t task, const ColumnThread<T>& t) const {
    constexpr int n = kChunk<T>;
    const typename F::Channels to(f, task, t.c, t.count);
    const int down = (s.H + s.KH - 1) / s.KH, across = (s.W + s.KW - 1) / s.KW;
    for (int row = t.row; row < t.end; row += t.step) {
      Chunk<T> d[F::kGradients] = {};
      if constexpr (kSide == 1) {
        const int i = row * s.C + t.c;
#pragma unroll
        for (int k = 0; k < F::kGradients; ++k) d[k] = load<kWide, n>(f.dy[k].of(task) + i, t.count);
        to.template write<kWide, true>(i, d, t.count);
      } else {
        const PoolThread<T> p(row, down, across, t.c, t.count);
        int at[n];
#pragma unroll
        for (int j = 0; j < n; ++j) at[j] = -1;
        if (p.h < s.OH && p.w < s.OW) {
          const int from = p.at(p.h, p.w, s.OH, s.OW, s.C);
          const Chunk<Tap, n> taps = load<kWide, n>(tap.of(task) + from, t.count);
#pragma unroll
          for (int k = 0; k < F::kGradients; ++k) {
            d[k] = load<kWide, n>(f.dy[k].of(task) + from, t.count);
#pragma unroll
            for (int j = 0; j < n; ++j) d[k].at[j] = f.act.times(taps.at[j] >= 0, d[k].at[j]);
          }
#pragma unroll
          for (int j = 0; j < n; ++j) at[j] = place_of(taps.at[j]);
        }
        for_window_taps<kSide>(s, p, [&](int here, int i) {
          Chunk<T> share[F::kGradients];
#pragma unroll
          for (int k = 0; k < F::kGradients; ++k)
#pragma unroll
            for (int j = 0; j < n; ++j) share[k].at[j] = at[j] == here ? d[k].at[j] : T(0);
          to.template write<kWide, false>(i, share, t.count);
        });
      }
    }
  }
};

// Any windows: a thread adds up, row by row, what the windows that contain its pixel pass to it.
template <class T, class F>
struct NormPoolActBwdWindows {
  F f;
  PerTask<const Tap> tap;
  PoolSizes s;

  template <bool kWide>
  __device__ void run(int64_t task, const ColumnThread<T>& t) const {
    constexpr int n = kChunk<T>;
    const typename F::Channels to(f, task, t.c, t.count);
    for (int row = t.row; row < t.end; row += t.step) {
      const PoolThread<T> p(row, s.H, s.W, t.c, t.count);
      Chunk<T> sum[F::kGradients] = {};
      for_windows(s, p, [&](int here, int oh, int ow) {
        const int from = p.at(oh, ow, s.OH, s.OW, s.C);
        const Chunk<Tap, n> taps = load<kWide, n>(tap.of(task) + from, t.count);
#pragma unroll
        for (int k = 0; k < F::kGradients; ++k) {
          const Chunk<T> d = load<kWide, n>(f.dy[k].of(task) + from, t.count);
#pragma unroll
          for (int j = 0; j < n; ++j)
            if (place_of(taps.at[j]) == here) sum[k].at[j] += f.act.times(taps.at[j] >= 0, d.at[j]);
        }
      });
      to.template write<kWide, false>(row * s.C + t.c, sum, t.count);
    }
  }
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
