// Pointwise functions with their first and second derivatives (ALGORITHMS section 6), on vectors. Only the error function of gelu is the
// C library's, once per element.
#include <cmath>

#include "cpu/kernels/exponential.h"
#include "cpu/kernels/rectifier.h"
#include "cpu/layout.h"

FASTMAML_CPU_BEGIN
namespace {

using Kind = Pointwise::Kind;

template <class V>
struct Derivatives {
  V f, first, second;
};

template <class V>
constexpr typename Ieee<typename Scalar<V>::type>::Int kSign = std::numeric_limits<typename Ieee<typename Scalar<V>::type>::Int>::min();

template <class V>
inline __attribute__((always_inline)) V magnitude(V x) {
  return std::bit_cast<V>(bits_of(x) & ~kSign<V>);
}
template <class V>
inline __attribute__((always_inline)) V with_sign_of(V x, V sign) {
  return std::bit_cast<V>((bits_of(x) & ~kSign<V>) | (bits_of(sign) & kSign<V>));
}

// tanh and 1 - tanh^2, which must not lose its digits where tanh is nearly 1.
template <class V>
struct Tanh {
  V y, slope;
  explicit Tanh(V x) {
    using T = typename Scalar<V>::type;
    const V shrink = expm1_negative(T(-2) * magnitude(x));  // e^(-2|x|) - 1
    const V over = reciprocal(T(2) + shrink);
    y = with_sign_of(shrink * over, x);
    slope = (T(4) + T(4) * shrink) * (over * over);
  }
};

template <class V>
struct Sigmoid {
  V s, slope;
  explicit Sigmoid(V x) {
    using T = typename Scalar<V>::type;
    const V e = exp_negative(-magnitude(x)), over = reciprocal(T(1) + e);
    s = x < V{} ? e * over : over;
    slope = e * over * over;
  }
};

template <class V>
inline V complementary_error(V x) {
  if constexpr (std::is_arithmetic_v<V>) {
    return V(std::erfc(double(x)));
  } else {
    for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = std::erfc(double(x[i]));
    return x;
  }
}

// One for each name of FASTMAML_SMOOTH: of x and the function's number.
template <class V, class T>
inline __attribute__((always_inline)) Derivatives<V> tanh_derivatives(V x, T) {
  const Tanh<V> t(x);
  return {t.y, t.slope, T(-2) * t.y * t.slope};
}

template <class V, class T>
inline __attribute__((always_inline)) Derivatives<V> sigmoid_derivatives(V x, T) {
  const Sigmoid<V> s(x);
  return {s.s, s.slope, s.slope * (T(1) - T(2) * s.s)};
}

template <class V, class T>
inline __attribute__((always_inline)) Derivatives<V> silu_derivatives(V x, T) {
  const Sigmoid<V> s(x);
  return {x * s.s, s.s + x * s.slope, s.slope * (T(2) + x * (T(1) - T(2) * s.s))};
}

// At 0 torch has f' = alpha and f'' = 0.
template <class V, class T>
inline __attribute__((always_inline)) Derivatives<V> elu_derivatives(V x, T alpha) {
  const V low = where(x < V{}, x, V{}), e = alpha * exp_negative(low);
  return {where(x <= V{}, alpha * expm1_negative(low), x), where(x <= V{}, e, V{} + T(1)), where(x < V{}, e, V{})};
}

template <class V, class T>
inline __attribute__((always_inline)) Derivatives<V> gelu_derivatives(V x, T) {
  const V cdf = T(0.5) * complementary_error(x * T(-0.70710678118654752440));
  const V pdf = T(0.39894228040143267794) * exp_negative(T(-0.5) * x * x);
  return {x * cdf, cdf + x * pdf, pdf * (T(2) - x * x)};
}

template <class V, class T>
inline __attribute__((always_inline)) Derivatives<V> gelu_tanh_derivatives(V x, T) {
  const T k = T(0.79788456080286535588), c = T(0.044715);
  const Tanh<V> t(k * (x + c * x * x * x));
  const V u1 = k * (T(1) + T(3) * c * x * x), u2 = (T(6) * k * c) * x, half = T(0.5) * x;
  return {half * (T(1) + t.y), T(0.5) * (T(1) + t.y) + half * t.slope * u1, t.slope * u1 + half * t.slope * (u2 - T(2) * t.y * u1 * u1)};
}

template <class V>
struct Pair {
  V value, tangent;
};

template <Kind kKind, class T>
struct Smooth {
  T number;

  template <class V>
  inline __attribute__((always_inline)) Derivatives<V> derivatives(V x) const {
#define X(name, key) \
  if constexpr (kKind == Kind::name) return name##_derivatives(x, number);
    FASTMAML_SMOOTH(X)
#undef X
  }
  template <class V>
  V value(V x) const {
    return derivatives(x).f;
  }
  template <class V>
  V times_first(V x, V d) const {
    return derivatives(x).first * d;
  }
  // f'(x) dy_dot + f''(x) x_dot dy
  template <class V>
  V times_both(V x, V x_dot, V dy, V dy_dot) const {
    const Derivatives<V> v = derivatives(x);
    return v.first * dy_dot + v.second * x_dot * dy;
  }
  template <class V>
  Pair<V> forward(V x, V x_dot) const {
    const Derivatives<V> v = derivatives(x);
    return {v.f, v.first * x_dot};
  }
  template <class V>
  Pair<V> backward(V x, V x_dot, V dy, V dy_dot) const {
    const Derivatives<V> v = derivatives(x);
    return {v.first * dy, v.first * dy_dot + v.second * x_dot * dy};
  }
};

// Which has no second derivative.
template <class T>
struct PiecewiseLinear : Rectifier<T> {
  template <class V>
  Pair<V> forward(V x, V x_dot) const {
    return {this->value(x), this->times_first(x, x_dot)};
  }
  template <class V>
  Pair<V> backward(V x, V /* x_dot */, V dy, V dy_dot) const {
    return {this->times_first(x, dy), this->times_first(x, dy_dot)};
  }
};

template <class T, class Body>
void with_function(const Pointwise& s, const Body& body) {
  switch (s.kind) {
    case Kind::relu:
      return body(PiecewiseLinear<T>{{T(0)}});
    case Kind::leaky_relu:
      return body(PiecewiseLinear<T>{{T(s.number)}});
#define X(name, key) \
  case Kind::name:   \
    return body(Smooth<Kind::name, T>{T(s.number)});
      FASTMAML_SMOOTH(X)
#undef X
  }
  __builtin_trap();
}

template <class Layout>
void pointwise_fwd(const Call& call) {
  const Pointwise& s = *std::get_if<Pointwise>(&call.layer);
  with_function<typename Layout::Type>(s, [&](const auto f) {
    for (int64_t g = 0; g < Layout::groups(call); ++g) {
      const auto y = Layout::operand(call, 0, g), x = Layout::operand(call, 1, g);
      Layout::each(call.step.examples * s.size, [&](auto lane, int64_t i) { y.put(i, f.value(x.template get<decltype(lane)>(i))); });
    }
  });
}

// f'(x) d: the tangent of the forward pass, and the backward pass.
template <class Layout>
void times_first(const Call& call) {
  const Pointwise& s = *std::get_if<Pointwise>(&call.layer);
  with_function<typename Layout::Type>(s, [&](const auto f) {
    for (int64_t g = 0; g < Layout::groups(call); ++g) {
      const auto out = Layout::operand(call, 0, g), x = Layout::operand(call, 1, g), d = Layout::operand(call, 2, g);
      Layout::each(call.step.examples * s.size, [&](auto lane, int64_t i) {
        using V = decltype(lane);
        x.ahead(i);
        out.put(i, f.times_first(x.template get<V>(i), d.template get<V>(i)));
      });
    }
  });
}

template <class Layout>
void pointwise_bwd_jvp(const Call& call) {
  const Pointwise& s = *std::get_if<Pointwise>(&call.layer);
  with_function<typename Layout::Type>(s, [&](const auto f) {
    for (int64_t g = 0; g < Layout::groups(call); ++g) {
      const auto out = Layout::operand(call, 0, g), x = Layout::operand(call, 1, g), x_dot = Layout::operand(call, 2, g);
      const auto dy = Layout::operand(call, 3, g), dy_dot = Layout::operand(call, 4, g);
      const int64_t size = call.step.examples * s.size;
      if (x_dot)
        Layout::each(size, [&](auto lane, int64_t i) {
          using V = decltype(lane);
          out.put(i, f.times_both(x.template get<V>(i), x_dot.template get<V>(i), dy.template get<V>(i), dy_dot.template get<V>(i)));
        });
      else
        Layout::each(size, [&](auto lane, int64_t i) {
          using V = decltype(lane);
          out.put(i, f.times_first(x.template get<V>(i), dy_dot.template get<V>(i)));
        });
    }
  });
}

template <class Layout>
void pointwise_fwd_dual(const Call& call) {
  const Pointwise& s = *std::get_if<Pointwise>(&call.layer);
  with_function<typename Layout::Type>(s, [&](const auto f) {
    for (int64_t g = 0; g < Layout::groups(call); ++g) {
      const auto y = Layout::operand(call, 0, g), y_dot = Layout::operand(call, 1, g);
      const auto x = Layout::operand(call, 2, g), x_dot = Layout::operand(call, 3, g);
      Layout::each(call.step.examples * s.size, [&](auto lane, int64_t i) {
        using V = decltype(lane);
        x.ahead(i);
        const Pair<V> both = f.forward(x.template get<V>(i), x_dot.template get<V>(i));
        y.put(i, both.value);
        y_dot.put(i, both.tangent);
      });
    }
  });
}

template <class Layout>
void pointwise_bwd_dual(const Call& call) {
  const Pointwise& s = *std::get_if<Pointwise>(&call.layer);
  with_function<typename Layout::Type>(s, [&](const auto f) {
    for (int64_t g = 0; g < Layout::groups(call); ++g) {
      const auto dx = Layout::operand(call, 0, g), dx_dot = Layout::operand(call, 1, g);
      const auto x = Layout::operand(call, 2, g), x_dot = Layout::operand(call, 3, g);
      const auto dy = Layout::operand(call, 4, g), dy_dot = Layout::operand(call, 5, g);
      Layout::each(call.step.examples * s.size, [&](auto lane, int64_t i) {
        using V = decltype(lane);
        x.ahead(i);
        dy.ahead(i);
        const V tangent = x_dot ? x_dot.template get<V>(i) : V{};
        const Pair<V> both = f.backward(x.template get<V>(i), tangent, dy.template get<V>(i), dy_dot.template get<V>(i));
        dx.put(i, both.value);
        dx_dot.put(i, both.tangent);
      });
    }
  });
}

}  // namespace

template <class Layout>
void add_pointwise_ops(OpTable& table) {
  set_op(table, Op::pointwise_fwd, pointwise_fwd<Layout>);
  set_op(table, Op::pointwise_fwd_jvp, times_first<Layout>);
  set_op(table, Op::pointwise_bwd, times_first<Layout>);
  set_op(table, Op::pointwise_bwd_jvp, pointwise_bwd_jvp<Layout>);
  set_op(table, Op::pointwise_fwd_dual, pointwise_fwd_dual<Layout>);
  set_op(table, Op::pointwise_bwd_dual, pointwise_bwd_dual<Layout>);
}
FASTMAML_BOTH_LAYOUTS(add_pointwise_ops)

FASTMAML_CPU_END
