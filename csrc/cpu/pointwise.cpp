// Pointwise functions with their first and second derivatives (ALGORITHMS section 6). ReLU and leaky ReLU are vectors of selects;
// the smooth ones call the C library once per element, so their bits do not depend on the instruction set.
#include <cmath>

#include "cpu/cpu.h"
#include "cpu/kernels/rectifier.h"

FASTMAML_CPU_BEGIN
namespace {

using Kind = Pointwise::Kind;

struct Derivatives {
  double f, first, second;
};

template <class T>
inline Derivatives smooth(Kind kind, T x_in) {
  const double x = double(x_in);
  switch (kind) {
    case Kind::tanh: {
      const double y = std::tanh(x), first = 1 - y * y;
      return {y, first, -2 * y * first};
    }
    case Kind::sigmoid: {
      const double s = 1 / (1 + std::exp(-x)), first = s * (1 - s);
      return {s, first, first * (1 - 2 * s)};
    }
    case Kind::silu: {
      const double s = 1 / (1 + std::exp(-x)), slope = s * (1 - s);
      return {x * s, s + x * slope, slope * (2 + x * (1 - 2 * s))};
    }
    case Kind::gelu: {
      const double cdf = 0.5 * std::erfc(-x * 0.70710678118654752440), pdf = 0.39894228040143267794 * std::exp(-0.5 * x * x);
      return {x * cdf, cdf + x * pdf, pdf * (2 - x * x)};
    }
    case Kind::gelu_tanh: {
      const double k = 0.79788456080286535588, c = 0.044715;
      const double t = std::tanh(k * (x + c * x * x * x)), S = 1 - t * t, u1 = k * (1 + 3 * c * x * x), u2 = 6 * k * c * x;
      return {0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * S * u1, S * u1 + 0.5 * x * S * (u2 - 2 * t * u1 * u1)};
    }
    case Kind::relu:
    case Kind::leaky_relu:
      break;
  }
  return {0, 0, 0};
}

bool rectifies(const Pointwise& s) { return s.kind == Kind::relu || s.kind == Kind::leaky_relu; }

template <class T>
void pointwise_fwd(const Call& call) {
  const Pointwise& s = *std::get_if<Pointwise>(&call.layer);
  const int64_t size = call.step.examples * s.size;
  const Rectifier<T> f{s.kind == Kind::relu ? T(0) : T(s.slope)};
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* y = at<T>(call, 0, t);
    const T* x = at<T>(call, 1, t);
    if (rectifies(s))
      for_lanes<T>(size, [&](auto lane, int64_t i) { store(y + i, f.value(load<decltype(lane)>(x + i))); });
    else
      for (int64_t i = 0; i < size; ++i) y[i] = T(smooth(s.kind, x[i]).f);
  }
}

// f'(x) d: the tangent of the forward pass, and the backward pass.
template <class T, int kX, int kD>
void times_first(const Call& call) {
  const Pointwise& s = *std::get_if<Pointwise>(&call.layer);
  const int64_t size = call.step.examples * s.size;
  const Rectifier<T> f{s.kind == Kind::relu ? T(0) : T(s.slope)};
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* out = at<T>(call, 0, t);
    const T *x = at<T>(call, kX, t), *d = at<T>(call, kD, t);
    if (rectifies(s)) {
      for_lanes<T>(size, [&](auto lane, int64_t i) {
        using V = decltype(lane);
        store(out + i, f.times_slope(load<V>(x + i), load<V>(d + i)));
      });
    } else {
      for (int64_t i = 0; i < size; ++i) out[i] = T(smooth(s.kind, x[i]).first * double(d[i]));
    }
  }
}

// dx_dot = f'(x) dy_dot + f''(x) x_dot dy
template <class T>
void pointwise_bwd_jvp(const Call& call) {
  const Pointwise& s = *std::get_if<Pointwise>(&call.layer);
  const int64_t size = call.step.examples * s.size;
  const Rectifier<T> f{s.kind == Kind::relu ? T(0) : T(s.slope)};
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* out = at<T>(call, 0, t);
    const T *x = at<T>(call, 1, t), *x_dot = at<T>(call, 2, t), *dy = at<T>(call, 3, t), *dy_dot = at<T>(call, 4, t);
    if (rectifies(s)) {
      for_lanes<T>(size, [&](auto lane, int64_t i) {
        using V = decltype(lane);
        store(out + i, f.times_slope(load<V>(x + i), load<V>(dy_dot + i)));
      });
    } else {
      for (int64_t i = 0; i < size; ++i) {
        const Derivatives v = smooth(s.kind, x[i]);
        out[i] = T(v.first * double(dy_dot[i]) + (x_dot ? v.second * double(x_dot[i]) * double(dy[i]) : 0.0));
      }
    }
  }
}

}  // namespace

template <class T>
void add_pointwise_ops(OpTable& table) {
  set_op(table, Op::pointwise_fwd, pointwise_fwd<T>);
  set_op(table, Op::pointwise_fwd_jvp, times_first<T, 1, 2>);
  set_op(table, Op::pointwise_bwd, times_first<T, 1, 2>);
  set_op(table, Op::pointwise_bwd_jvp, pointwise_bwd_jvp<T>);
}
template void add_pointwise_ops<float>(OpTable&);
template void add_pointwise_ops<double>(OpTable&);

FASTMAML_CPU_END
