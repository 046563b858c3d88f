// batch norm, max-pool (or none) and ReLU or leaky ReLU as one op: z = gamma xhat + beta, y = act(the largest z of a window).
//   x [N, H, W, C]   y, winner, tap, dy [N, OH, OW, C]; winner and tap as in program/op.h
// z and its gradient are never in memory.
// Each formula is folded, in double, into a few numbers for each channel.
// They multiply the pixels' x - mean, x_dot - mean(x_dot), dz and dz_dot.
#include "cpu/cpu.h"
#include "cpu/kernels/normalization.h"
#include "cpu/kernels/pool_windows.h"
#include "cpu/kernels/rectifier.h"

FASTMAML_CPU_BEGIN
namespace {

struct Sizes {
  const BatchNorm norm;
  const Pool2d pool;  // a copy, so that the compiler need not read it again after each store
  const bool pooled;
  const double slope;
  const int64_t C, N, stat_N, windows;  // of all examples
  Sizes(const Step& step, const NormPoolAct& s)
      : norm(s.norm),
        pool(s.pool),
        pooled(s.pooled),
        slope(s.slope),
        C(s.norm.C),
        N(step.examples),
        stat_N(step.stat_examples),
        windows(N * s.pool.OH * s.pool.OW) {}
  explicit Sizes(const Call& call) : Sizes(call.step, call.shape<NormPoolAct>()) {}

  bool feels_statistics(int64_t n) const { return !norm.frozen && n < stat_N; }
  double over() const { return 1.0 / double(stat_N * norm.spatial); }
};

size_t scratch_bytes(const Step&, const Layer& layer) {
  const int64_t C = std::get<NormPoolAct>(layer).norm.C;
  Scratch scratch(nullptr);
  scratch.take<double>(2 * C);                          // sums
  for (int i = 0; i < 9; ++i) scratch.take<double>(C);  // a channel's numbers
  return scratch.used();
}

// Calls body(side). 1: no pool, the window is the pixel; 2: 2 x 2 without padding; 0: any windows.
template <class Body>
void with_side(const Sizes& z, Body body) {
  const Pool2d& p = z.pool;
  if (!z.pooled) return body(std::integral_constant<int, 1>());
  if (p.KH == 2 && p.KW == 2 && p.pad_h == 0 && p.pad_w == 0) return body(std::integral_constant<int, 2>());
  body(std::integral_constant<int, 0>());
}

// Calls f(V{}, c, n, h, w) for h < rows and w < columns of every example. All channels of one place come before the next place.
// This order of memory streams 1.4 times as fast as channel by channel. A channel's numbers come from L1 each time.
template <class T, class F>
inline __attribute__((always_inline)) void for_places(const Sizes& z, int64_t rows, int64_t columns, F f) {
  for (int64_t n = 0; n < z.N; ++n)
    for (int64_t h = 0; h < rows; ++h)
      for (int64_t w = 0; w < columns; ++w) for_lanes<T>(z.C, [&](auto lane, int64_t c) { f(lane, c, n, h, w); });
}

// Calls f(tap, input pixel) for the taps of a window inside the image.
template <int kSide, class F>
inline __attribute__((always_inline)) void for_window(const Pool2d& p, int64_t n, int64_t oh, int64_t ow, F f) {
  if constexpr (kSide == 0) {
    for_taps(p, n, oh * p.stride_h - p.pad_h, ow * p.stride_w - p.pad_w, f);
  } else {
    const int64_t first = (n * p.H + oh * p.stride_h) * p.W + ow * p.stride_w;
    f(0, first);
    if constexpr (kSide == 2) {
      f(1, first + 1);
      f(2, first + p.W);
      f(3, first + p.W + 1);
    }
  }
}

// A tap is stored as tap or ~tap (program/op.h). Below: its number, and whether the activation let the value through.
template <class I>
inline __attribute__((always_inline)) I place_of(I tap) {
  return where(tap < I{}, ~tap, tap);
}

// ---------------------------------------------------------------- forward

// Torch's rules: the first in scan order wins a tie, NaN beats every number.
template <class T>
void norm_pool_act_fwd(const Call& call) {
  const Sizes z(call);
  const Rectifier<T> act{T(z.slope)};
  for (int64_t t = 0; t < call.tasks; ++t) {
    Scratch scratch(call.scratch);
    T *y = at<T>(call, 0, t), *winner = at<T>(call, 2, t);
    int8_t* tap = at<int8_t>(call, 1, t);
    const T* x = at<T>(call, 3, t);
    const Affine<T> affine(stats_of<T>(call, 4, -1, t, z.C), at<T>(call, 5, t), at<T>(call, 6, t), scratch);
    with_side(z, [&](auto side) {
      for_places<T>(z, z.pool.OH, z.pool.OW, [&](auto lane, int64_t c, int64_t n, int64_t oh, int64_t ow) {
        using V = decltype(lane);
        using I = typename IntOf<V>::type;
        const auto channels = affine.template at<V>(c);
        const int64_t i = ((n * z.pool.OH + oh) * z.pool.OW + ow) * z.C + c;
        V largest{}, of_x{};
        I place{};
        bool first = true;
        for_window<side()>(z.pool, n, oh, ow, [&](int32_t k, int64_t pixel) {
          const V here = load<V>(x + pixel * z.C + c), of_here = channels.z(here);
          const I k_here = broadcast<I>(k);
          if (first) {
            largest = of_here;
            of_x = here;
            place = k_here;
            first = false;
          } else {
            const auto wins = (of_here > largest) | (of_here != of_here);
            largest = where(wins, of_here, largest);
            of_x = where(wins, here, of_x);
            place = where(wins, k_here, place);
          }
        });
        if constexpr (side() != 1) {
          store_bytes(tap + i, where(act.passes(largest), place, ~place));
          store(winner + i, of_x);
        }
        store(y + i, act.value(largest));
      });
    });
  }
}

// y' = act'(z) (gamma' xhat + gamma xhat' + beta') of the winner. winner_dot keeps the winner's x'.
template <class T>
void norm_pool_act_fwd_jvp(const Call& call) {
  const Sizes z(call);
  const Rectifier<T> act{T(z.slope)};
  for (int64_t t = 0; t < call.tasks; ++t) {
    Scratch scratch(call.scratch);
    T *y_dot = at<T>(call, 0, t), *winner_dot = at<T>(call, 1, t);
    const int8_t* tap = at<int8_t>(call, 2, t);
    const T *winner = at<T>(call, 3, t), *x_dot = at<T>(call, 4, t);
    const Stats<T> stats = stats_of<T>(call, 5, 6, t, z.C);
    const T *gamma = at<T>(call, 7, t), *gamma_dot = at<T>(call, 8, t), *beta = at<T>(call, 9, t), *beta_dot = at<T>(call, 10, t);
    const Affine<T> affine(stats, gamma, beta, scratch);
    T *by_x = scratch.take<T>(z.C), *by_x_dot = scratch.take<T>(z.C), *constant = scratch.take<T>(z.C), *mean_dot = scratch.take<T>(z.C);
    for (int64_t c = 0; c < z.C; ++c) {
      const double factor = value_or(gamma, c, 1) * stats.r(c);
      const double slope = (value_or(gamma_dot, c, 0) - factor * stats.s(c)) * stats.r(c);
      by_x[c] = T(slope);
      by_x_dot[c] = T(factor);
      constant[c] = T(value_or(beta_dot, c, 0) - slope * stats.rest(c));
      mean_dot[c] = T(stats.mean_dot(c));
    }
    with_side(z, [&](auto side) {
      for_places<T>(z, z.pool.OH, z.pool.OW, [&](auto lane, int64_t c, int64_t n, int64_t oh, int64_t ow) {
        using V = decltype(lane);
        using I = typename IntOf<V>::type;
        const auto channels = affine.template at<V>(c);
        const V slope = load<V>(by_x + c), slope_dot = load<V>(by_x_dot + c), zero_dot = load<V>(mean_dot + c);
        const V at_mean = load<V>(constant + c);
        const int64_t i = ((n * z.pool.OH + oh) * z.pool.OW + ow) * z.C + c;
        const V centred = load<V>(winner + i) - channels.mean;
        V here{};
        if constexpr (side() == 1) {
          here = load_or<V>(x_dot, i, T(0));
        } else if (x_dot) {
          const I place = place_of(load_bytes<I>(tap + i));
          for_window<side()>(z.pool, n, oh, ow, [&](int32_t k, int64_t pixel) {
            here = where(place == broadcast<I>(k), load<V>(x_dot + pixel * z.C + c), here);
          });
          store(winner_dot + i, here);
        }
        const V z_dot = centred * slope + ((here - zero_dot) * slope_dot + at_mean);
        store(y_dot + i, act.times_first(channels.z_of_centred(centred), z_dot));
      });
    });
  }
}

// ---------------------------------------------------------------- gamma and beta: sums over the winners

// dgamma = sum of dz xhat,  dbeta = sum of dz  with  dz = act'(z) dy
template <class T>
void norm_pool_act_bwd_weight(const Call& call) {
  const Sizes z(call);
  const Rectifier<T> act{T(z.slope)};
  for (int64_t t = 0; t < call.tasks; ++t) {
    Scratch scratch(call.scratch);
    double* sums = scratch.take<double>(2 * z.C);
    T *dgamma = at<T>(call, 0, t), *dbeta = at<T>(call, 1, t);
    const T *winner = at<T>(call, 2, t), *dy = at<T>(call, 3, t);
    const Stats<T> stats = stats_of<T>(call, 4, -1, t, z.C);
    const Affine<T> affine(stats, at<T>(call, 5, t), at<T>(call, 6, t), scratch);
    column_sums<T, 2>(z.windows, z.C, sums, [&](auto lane, int64_t row, int64_t c, auto* sum) {
      using V = decltype(lane);
      const auto channels = affine.template at<V>(c);
      const V centred = load<V>(winner + row * z.C + c) - channels.mean;
      const V dz = act.times_first(channels.z_of_centred(centred), load<V>(dy + row * z.C + c));
      sum[0] = dz * centred;
      sum[1] = dz;
    });
    for (int64_t c = 0; c < z.C; ++c) {
      dgamma[c] = T(stats.r(c) * (sums[c] - stats.rest(c) * sums[z.C + c]));
      dbeta[c] = T(sums[z.C + c]);
    }
  }
}

// dgamma' = sum of dz' xhat + dz xhat',  dbeta' = sum of dz'
template <class T>
void norm_pool_act_bwd_weight_jvp(const Call& call) {
  const Sizes z(call);
  const Rectifier<T> act{T(z.slope)};
  for (int64_t t = 0; t < call.tasks; ++t) {
    Scratch scratch(call.scratch);
    double* sums = scratch.take<double>(2 * z.C);
    T *dgamma_dot = at<T>(call, 0, t), *dbeta_dot = at<T>(call, 1, t);
    const T *winner = at<T>(call, 2, t), *winner_dot = at<T>(call, 3, t), *dy = at<T>(call, 4, t), *dy_dot = at<T>(call, 5, t);
    const Stats<T> stats = stats_of<T>(call, 6, 7, t, z.C);
    const Affine<T> affine(stats, at<T>(call, 8, t), at<T>(call, 9, t), scratch);
    T *mean_dot = scratch.take<T>(z.C), *rs = scratch.take<T>(z.C), *constant = scratch.take<T>(z.C);
    for (int64_t c = 0; c < z.C; ++c) {  // xhat' = r (x' - mean' - r s (x - mean) + constant)
      mean_dot[c] = T(stats.mean_dot(c));
      rs[c] = T(stats.r(c) * stats.s(c));
      constant[c] = T(stats.r(c) * stats.s(c) * stats.rest(c));
    }
    column_sums<T, 2>(z.windows, z.C, sums, [&](auto lane, int64_t row, int64_t c, auto* sum) {
      using V = decltype(lane);
      const int64_t i = row * z.C + c;
      const auto channels = affine.template at<V>(c);
      const V centred = load<V>(winner + i) - channels.mean, of_centred = channels.z_of_centred(centred);
      const V dz = act.times_first(of_centred, load<V>(dy + i)), dz_dot = act.times_first(of_centred, load<V>(dy_dot + i));
      const V centred_dot = load_or<V>(winner_dot, i, T(0)) - load<V>(mean_dot + c) - (centred * load<V>(rs + c) - load<V>(constant + c));
      sum[0] = dz_dot * centred + dz * centred_dot;
      sum[1] = dz_dot;
    });
    for (int64_t c = 0; c < z.C; ++c) {
      dgamma_dot[c] = T(stats.r(c) * (sums[c] - stats.rest(c) * sums[z.C + c]));
      dbeta_dot[c] = T(sums[z.C + c]);
    }
  }
}

// ---------------------------------------------------------------- x

// dx of a pixel, or dx_dot with kDot, is  dz by_dz + dz_dot by_dz_dot.  Without kDot there are no dz_dot and x_dot.
// Examples that give the statistics add  (x - mean) by_x + (x_dot - mean_dot) by_x_dot + constant.
template <class T, bool kDot>
struct DataGradient {
  const T *x, *x_dot = nullptr, *dy, *dy_dot = nullptr;
  Rectifier<T> act;
  Affine<T> affine;
  T *by_dz, *by_dz_dot, *by_x, *by_x_dot, *constant, *mean_dot;

  DataGradient(const Sizes& z, const Stats<T>& stats, const T* gamma, const T* beta, Scratch& scratch)
      : act{T(z.slope)},
        affine(stats, gamma, beta, scratch),
        by_dz(scratch.take<T>(z.C)),
        by_dz_dot(kDot ? scratch.take<T>(z.C) : nullptr),
        by_x(scratch.take<T>(z.C)),
        by_x_dot(kDot ? scratch.take<T>(z.C) : nullptr),
        constant(scratch.take<T>(z.C)),
        mean_dot(kDot ? scratch.take<T>(z.C) : nullptr) {}

  template <class V>
  struct Channels {
    const DataGradient& from;
    typename Affine<T>::template Channels<V> norm;
    V by_dz, by_dz_dot, by_x, by_x_dot, constant, mean_dot;

    Channels(const DataGradient& g, int64_t c)
        : from(g),
          norm(g.affine.template at<V>(c)),
          by_dz(load<V>(g.by_dz + c)),
          by_x(load<V>(g.by_x + c)),
          constant(load<V>(g.constant + c)) {
      if constexpr (kDot) {
        by_dz_dot = load<V>(g.by_dz_dot + c);
        by_x_dot = load<V>(g.by_x_dot + c);
        mean_dot = load<V>(g.mean_dot + c);
      }
    }

    // the term through dz = act'(z) dy, where the activation's slope is one
    V of_dy(int64_t i) const {
      V share = load<V>(from.dy + i) * by_dz;
      if constexpr (kDot) share = load<V>(from.dy_dot + i) * by_dz_dot + share;
      return share;
    }
    // the term through the statistics
    V of_statistics(int64_t i) const {
      V share = (load<V>(from.x + i) - norm.mean) * by_x + constant;
      if constexpr (kDot) share = (load_or<V>(from.x_dot, i, T(0)) - mean_dot) * by_x_dot + share;
      return share;
    }
    // a window's term for the pixel at its tap
    template <class I>
    V of_window(int64_t i, I tap) const {
      const V share = of_dy(i);
      return where(tap < I{}, from.act.low(share), share);
    }
  };
};

// No pool, or adjacent windows of 2 x 2: a window writes all of its pixels.
template <class T, int kSide, bool kDot>
void write_tiles(const Sizes& z, T* dx, const int8_t* tap, const DataGradient<T, kDot>& gradient) {
  const Pool2d& p = z.pool;
  const int64_t down = (p.H + kSide - 1) / kSide, across = (p.W + kSide - 1) / kSide;
  for_places<T>(z, down, across, [&](auto lane, int64_t c, int64_t n, int64_t oh, int64_t ow) {
    using V = decltype(lane);
    using I = typename IntOf<V>::type;
    const typename DataGradient<T, kDot>::template Channels<V> channels(gradient, c);
    const bool inside = z.feels_statistics(n);
    const int64_t i = ((n * p.OH + oh) * p.OW + ow) * z.C + c;
    if constexpr (kSide == 1) {
      const V share = gradient.act.times_first(channels.norm.z(load<V>(gradient.x + i)), channels.of_dy(i));
      store(dx + i, inside ? share + channels.of_statistics(i) : share);
    } else if (oh < p.OH && ow < p.OW) {
      const I of_window = load_bytes<I>(tap + i), place = place_of(of_window);
      const V share = channels.of_window(i, of_window);
      for_window<kSide>(p, n, oh, ow, [&](int32_t k, int64_t pixel) {
        const V here = where(place == broadcast<I>(k), share, V{});
        store(dx + pixel * z.C + c, inside ? here + channels.of_statistics(pixel * z.C + c) : here);
      });
    } else {  // pixels at the edge that no window covers
      for_taps(p, n, oh * kSide, ow * kSide,
               [&](int32_t, int64_t pixel) { store(dx + pixel * z.C + c, inside ? channels.of_statistics(pixel * z.C + c) : V{}); });
    }
  });
}

// Any windows: writes the statistics' term of all pixels, then adds each window's term to its winner.
template <class T, bool kDot>
void write_windows(const Sizes& z, T* dx, const int8_t* tap, const DataGradient<T, kDot>& gradient) {
  const Pool2d& p = z.pool;
  for_places<T>(z, p.H, p.W, [&](auto lane, int64_t c, int64_t n, int64_t h, int64_t w) {
    using V = decltype(lane);
    const typename DataGradient<T, kDot>::template Channels<V> channels(gradient, c);
    const int64_t i = ((n * p.H + h) * p.W + w) * z.C + c;
    store(dx + i, z.feels_statistics(n) ? channels.of_statistics(i) : V{});
  });
  for_places<T>(z, p.OH, p.OW, [&](auto lane, int64_t c, int64_t n, int64_t oh, int64_t ow) {
    using V = decltype(lane);
    using I = typename IntOf<V>::type;
    const typename DataGradient<T, kDot>::template Channels<V> channels(gradient, c);
    const int64_t i = ((n * p.OH + oh) * p.OW + ow) * z.C + c;
    const I of_window = load_bytes<I>(tap + i), place = place_of(of_window);
    const V share = channels.of_window(i, of_window);
    for_window<0>(p, n, oh, ow, [&](int32_t k, int64_t pixel) {
      T* to = dx + pixel * z.C + c;
      store(to, load<V>(to) + where(place == broadcast<I>(k), share, V{}));
    });
  });
}

template <class T, bool kDot>
void write(const Sizes& z, T* dx, const int8_t* tap, const DataGradient<T, kDot>& gradient) {
  if (!z.pooled) return write_tiles<T, 1>(z, dx, tap, gradient);
  if (tiles(z.pool) && z.pool.KH == 2 && z.pool.KW == 2) return write_tiles<T, 2>(z, dx, tap, gradient);
  write_windows(z, dx, tap, gradient);
}

// dx = gamma r u  with  u = dz - dbeta / M - xhat dgamma / M  in the M rows that give the statistics, and u = dz in all others
template <class T>
void norm_pool_act_bwd_data(const Call& call) {
  const Sizes z(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    Scratch scratch(call.scratch);
    const Stats<T> stats = stats_of<T>(call, 4, -1, t, z.C);
    const T *gamma = at<T>(call, 5, t), *beta = at<T>(call, 6, t), *dgamma = at<T>(call, 7, t), *dbeta = at<T>(call, 8, t);
    DataGradient<T, false> g(z, stats, gamma, beta, scratch);
    g.x = at<T>(call, 2, t);
    g.dy = at<T>(call, 3, t);
    for (int64_t c = 0; c < z.C; ++c) {
      const double factor = value_or(gamma, c, 1) * stats.r(c), by_x = -factor * stats.r(c) * double(dgamma[c]) * z.over();
      g.by_dz[c] = T(factor);
      g.by_x[c] = T(by_x);
      g.constant[c] = T(-factor * double(dbeta[c]) * z.over() - by_x * stats.rest(c));
    }
    write(z, at<T>(call, 0, t), at<int8_t>(call, 1, t), g);
  }
}

// dx' = (gamma' r + gamma r') u + gamma r u'  with  u' = dz' - dbeta' / M - xhat' dgamma / M - xhat dgamma' / M,  or u' = dz',
// and r' = -r^2 s
template <class T>
void norm_pool_act_bwd_data_jvp(const Call& call) {
  const Sizes z(call);
  for (int64_t t = 0; t < call.tasks; ++t) {
    Scratch scratch(call.scratch);
    const Stats<T> stats = stats_of<T>(call, 6, 7, t, z.C);
    const T *gamma = at<T>(call, 8, t), *gamma_dot = at<T>(call, 9, t), *beta = at<T>(call, 10, t);
    const T *dgamma = at<T>(call, 11, t), *dbeta = at<T>(call, 12, t), *dgamma_dot = at<T>(call, 13, t), *dbeta_dot = at<T>(call, 14, t);
    DataGradient<T, true> g(z, stats, gamma, beta, scratch);
    g.x = at<T>(call, 2, t);
    g.x_dot = at<T>(call, 3, t);
    g.dy = at<T>(call, 4, t);
    g.dy_dot = at<T>(call, 5, t);
    for (int64_t c = 0; c < z.C; ++c) {
      const double r = stats.r(c), rs = r * stats.s(c), factor = value_or(gamma, c, 1) * r;
      const double factor_dot = value_or(gamma_dot, c, 0) * r - factor * rs;
      const double rq = r * double(dgamma[c]) * z.over(), rq_dot = r * double(dgamma_dot[c]) * z.over();
      const double p = double(dbeta[c]) * z.over(), p_dot = double(dbeta_dot[c]) * z.over();
      const double by_x = factor * (rq * rs - rq_dot) - factor_dot * rq;
      g.by_dz[c] = T(factor_dot);
      g.by_dz_dot[c] = T(factor);
      g.by_x[c] = T(by_x);
      g.by_x_dot[c] = T(-factor * rq);
      g.constant[c] = T(-factor_dot * p - factor * p_dot - by_x * stats.rest(c));
      g.mean_dot[c] = T(stats.mean_dot(c));
    }
    write(z, at<T>(call, 0, t), at<int8_t>(call, 1, t), g);
  }
}

}  // namespace

template <class T>
void add_norm_pool_act_ops(OpTable& table) {
  set_op(table, Op::norm_pool_act_fwd, norm_pool_act_fwd<T>, scratch_bytes);
  set_op(table, Op::norm_pool_act_fwd_jvp, norm_pool_act_fwd_jvp<T>, scratch_bytes);
  set_op(table, Op::norm_pool_act_bwd_weight, norm_pool_act_bwd_weight<T>, scratch_bytes);
  set_op(table, Op::norm_pool_act_bwd_weight_jvp, norm_pool_act_bwd_weight_jvp<T>, scratch_bytes);
  set_op(table, Op::norm_pool_act_bwd_data, norm_pool_act_bwd_data<T>, scratch_bytes);
  set_op(table, Op::norm_pool_act_bwd_data_jvp, norm_pool_act_bwd_data_jvp<T>, scratch_bytes);
}
template void add_norm_pool_act_ops<float>(OpTable&);
template void add_norm_pool_act_ops<double>(OpTable&);

FASTMAML_CPU_END
