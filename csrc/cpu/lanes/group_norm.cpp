// Group norm and layer norm in lanes. Formulas: ALGORITHMS section 6, reference/group_norm.cpp.
#include "cpu/lanes/lanes.h"
#include "cpu/vec_math.h"

FASTMAML_CPU_BEGIN
namespace {

// Adds blocks of 16, so that the error does not grow with the number of addends.
template <class V>
class BlockSum {
 public:
  void add(V x) {
    block_ += x;
    if (++count_ % 16 == 0) {
      total_.add(block_);
      block_ = V{};
    }
  }
  V value() {
    total_.add(block_);
    block_ = V{};
    return total_.value();
  }

 private:
  V block_{};
  int64_t count_ = 0;
  LaneSum<V> total_;
};

// Elements are numbered as in memory: (n spatial + pixel) channels + c. Groups: n groups + g.
template <class T>
struct Norm {
  using V = Vec<T>;
  static constexpr int64_t L = kLanes<T>;
  const Call& call;
  const int64_t lanes_group;
  const GroupNorm& s = *std::get_if<GroupNorm>(&call.layer);
  const int64_t N = call.step.examples, width = s.channels / s.groups, count = N * s.groups;
  const LaneRectifier<T> rectify{s.y};

  T* operand(int i) const { return in_lanes<T>(call, i, lanes_group); }
  static V at(const T* x, int64_t i) { return load<V>(x + i * L); }
  static V at_or(const T* x, int64_t i, T otherwise) { return x ? at(x, i) : broadcast<V>(otherwise); }
  // A gradient, masked by the rectifier that made y if there is one.
  V masked(const T* d, const T* y, int64_t i) const { return y ? rectify(at(y, i), at(d, i)) : at(d, i); }

  template <class Body>
  void each_of_group(int64_t group, const Body& body) const {
    const int64_t n = group / s.groups, first = group % s.groups * width;
    for (int64_t pixel = 0; pixel < s.spatial; ++pixel)
      for (int64_t c = first; c < first + width; ++c) body((n * s.spatial + pixel) * s.channels + c, c);
  }
  template <class F>
  V mean(int64_t group, const F& f) const {
    BlockSum<V> sum;
    each_of_group(group, [&](int64_t i, int64_t c) { sum.add(f(i, c)); });
    return sum.value() * T(1.0 / double(s.spatial * width));
  }
  template <class Body>
  void each_of_channel(int64_t c, const Body& body) const {
    for (int64_t n = 0; n < N; ++n)
      for (int64_t pixel = 0; pixel < s.spatial; ++pixel) body((n * s.spatial + pixel) * s.channels + c, n * s.groups + c / width);
  }
};

// xhat and its tangent.
template <class T>
struct Normalized {
  using V = Vec<T>;
  const T *x, *x_dot, *stats, *stats_dot;
  static V at(const T* p, int64_t i) { return Norm<T>::at(p, i); }
  static V at_or(const T* p, int64_t i) { return Norm<T>::at_or(p, i, T(0)); }

  V r(int64_t group) const { return at(stats, 2 * group + 1); }
  V xhat(int64_t i, int64_t group) const { return (at(x, i) - at(stats, 2 * group)) * r(group); }
  V dot(int64_t i, int64_t group) const {
    return r(group) * (at_or(x_dot, i) - at_or(stats_dot, 2 * group) - xhat(i, group) * at_or(stats_dot, 2 * group + 1));
  }
};

template <class T, class Body>
void each_lanes(const Call& call, const Body& body) {
  for (int64_t g = 0; g < LaneMajor<T>::groups(call); ++g) body(Norm<T>{call, g});
}

template <class T>
void group_norm_fwd(const Call& call) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  each_lanes<T>(call, [&](const Norm<T>& f) {
    T *y = f.operand(0), *stats = f.operand(1);
    const T *x = f.operand(2), *gamma = f.operand(3), *beta = f.operand(4);
    for (int64_t group = 0; group < f.count; ++group) {
      const V mean = f.mean(group, [&](int64_t i, int64_t) { return f.at(x, i); });
      const V var = f.mean(group, [&](int64_t i, int64_t) {
        const V d = f.at(x, i) - mean;
        return d * d;
      });
      const V r = T(1) / square_root<V>(var + T(f.s.eps));
      store(stats + 2 * group * L, mean);
      store(stats + (2 * group + 1) * L, r);
      f.each_of_group(group, [&](int64_t i, int64_t c) {
        const V out = f.at_or(gamma, c, T(1)) * ((f.at(x, i) - mean) * r) + f.at_or(beta, c, T(0));
        store(y + i * L, f.rectify.on ? f.rectify(out, out) : out);
      });
    }
  });
}

template <class T>
void group_norm_fwd_jvp(const Call& call) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  each_lanes<T>(call, [&](const Norm<T>& f) {
    T *y_dot = f.operand(0), *stats_dot = f.operand(1);
    const Normalized<T> at{f.operand(2), f.operand(3), f.operand(4), stats_dot};
    const T *gamma = f.operand(5), *gamma_dot = f.operand(6), *beta_dot = f.operand(7), *y = f.operand(8);
    for (int64_t group = 0; group < f.count; ++group) {
      V mean_dot{}, slope{};
      if (at.x_dot) {
        mean_dot = f.mean(group, [&](int64_t i, int64_t) { return f.at(at.x_dot, i); });
        slope = f.mean(group, [&](int64_t i, int64_t) { return at.xhat(i, group) * f.at(at.x_dot, i); });
      }
      store(stats_dot + 2 * group * L, mean_dot);
      store(stats_dot + (2 * group + 1) * L, slope);
      f.each_of_group(group, [&](int64_t i, int64_t c) {
        const V out =
            f.at_or(gamma_dot, c, T(0)) * at.xhat(i, group) + f.at_or(gamma, c, T(1)) * at.dot(i, group) + f.at_or(beta_dot, c, T(0));
        store(y_dot + i * L, y ? f.rectify(f.at(y, i), out) : out);
      });
    }
  });
}

// With h = gamma dy:  dx = r (h - mean(h) - xhat mean(h xhat));   dgamma = sum of dy xhat,  dbeta = sum of dy
template <class T>
void group_norm_bwd(const Call& call) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  each_lanes<T>(call, [&](const Norm<T>& f) {
    T *dx = f.operand(0), *dgamma = f.operand(1), *dbeta = f.operand(2);
    const Normalized<T> at{f.operand(3), nullptr, f.operand(5), nullptr};
    const T *d = f.operand(4), *gamma = f.operand(6), *y = f.operand(7);
    for (int64_t c = 0; c < f.s.channels; ++c) {
      BlockSum<V> of_gamma, of_beta;
      f.each_of_channel(c, [&](int64_t i, int64_t group) {
        const V dy = f.masked(d, y, i);
        of_gamma.add(dy * at.xhat(i, group));
        of_beta.add(dy);
      });
      store(dgamma + c * L, of_gamma.value());
      store(dbeta + c * L, of_beta.value());
    }
    if (!dx) return;
    for (int64_t group = 0; group < f.count; ++group) {
      const auto h = [&](int64_t i, int64_t c) { return f.at_or(gamma, c, T(1)) * f.masked(d, y, i); };
      const V mean = f.mean(group, h);
      const V slope = f.mean(group, [&](int64_t i, int64_t c) { return h(i, c) * at.xhat(i, group); });
      f.each_of_group(group, [&](int64_t i, int64_t c) { store(dx + i * L, at.r(group) * (h(i, c) - mean - at.xhat(i, group) * slope)); });
    }
  });
}

// With h' = gamma' dy + gamma dy':  dx' = r' u + r u',  r' = -r^2 s,
// u' = h' - mean(h') - xhat' mean(h xhat) - xhat mean(h' xhat + h xhat');   dgamma' = sum of dy' xhat + dy xhat',  dbeta' = sum of dy'
template <class T>
void group_norm_bwd_jvp(const Call& call) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  each_lanes<T>(call, [&](const Norm<T>& f) {
    T *dx_dot = f.operand(0), *dgamma_dot = f.operand(1), *dbeta_dot = f.operand(2);
    const Normalized<T> at{f.operand(3), f.operand(4), f.operand(7), f.operand(8)};
    const T *d = f.operand(5), *d_dot = f.operand(6), *gamma = f.operand(9), *gamma_dot = f.operand(10), *y = f.operand(11);
    for (int64_t c = 0; c < f.s.channels; ++c) {
      BlockSum<V> of_gamma, of_beta;
      f.each_of_channel(c, [&](int64_t i, int64_t group) {
        const V dy_dot = f.masked(d_dot, y, i);
        of_gamma.add(dy_dot * at.xhat(i, group) + f.masked(d, y, i) * at.dot(i, group));
        of_beta.add(dy_dot);
      });
      store(dgamma_dot + c * L, of_gamma.value());
      store(dbeta_dot + c * L, of_beta.value());
    }
    if (!dx_dot) return;
    for (int64_t group = 0; group < f.count; ++group) {
      const auto h = [&](int64_t i, int64_t c) { return f.at_or(gamma, c, T(1)) * f.masked(d, y, i); };
      const auto h_dot = [&](int64_t i, int64_t c) {
        const V of_dot = f.at_or(gamma, c, T(1)) * f.masked(d_dot, y, i);
        return gamma_dot ? f.at(gamma_dot, c) * f.masked(d, y, i) + of_dot : of_dot;
      };
      const V r = at.r(group), r_dot = -r * r * at.at_or(at.stats_dot, 2 * group + 1);
      const V mean = f.mean(group, h), mean_dot = f.mean(group, h_dot);
      const V slope = f.mean(group, [&](int64_t i, int64_t c) { return h(i, c) * at.xhat(i, group); });
      const V slope_dot = f.mean(group, [&](int64_t i, int64_t c) { return h_dot(i, c) * at.xhat(i, group) + h(i, c) * at.dot(i, group); });
      f.each_of_group(group, [&](int64_t i, int64_t c) {
        const V u = h(i, c) - mean - at.xhat(i, group) * slope;
        const V u_dot = h_dot(i, c) - mean_dot - at.dot(i, group) * slope - at.xhat(i, group) * slope_dot;
        store(dx_dot + i * L, r_dot * u + r * u_dot);
      });
    }
  });
}

}  // namespace

template <class T>
void add_lane_group_norm_ops(OpTable& table) {
  set_op(table, Op::group_norm_fwd, group_norm_fwd<T>);
  set_op(table, Op::group_norm_fwd_jvp, group_norm_fwd_jvp<T>);
  set_op(table, Op::group_norm_bwd, group_norm_bwd<T>);
  set_op(table, Op::group_norm_bwd_jvp, group_norm_bwd_jvp<T>);
}
template void add_lane_group_norm_ops<float>(OpTable&);
template void add_lane_group_norm_ops<double>(OpTable&);

FASTMAML_CPU_END
