// Pointwise functions with their first and second derivatives (ALGORITHMS section 6), as functions of kernels/map.cuh.
// All in the type of the numbers: where 1 - y^2 or 1 - s would cancel, they are written by e = exp(-|..|), which lies in [0, 1].
#pragma once

#include "cuda/kernels/map.cuh"
#include "cuda/kernels/rectifier.cuh"
#include "program/pointwise.h"

namespace fastmaml::FASTMAML_CUDA_NS {

template <class T>
struct Derivatives {
  T f, first, second;
};

// One for each name of FASTMAML_SMOOTH: of x and the function's number.
template <class T>
__device__ __forceinline__ Derivatives<T> tanh_derivatives(T x, T = 0) {
  const T e = exp(T(-2) * fabs(x)), y = tanh(x), first = T(4) * e / ((T(1) + e) * (T(1) + e));
  return {y, first, T(-2) * y * first};
}

template <class T>
struct Sigmoid {
  T s, rest, slope;  // s(x), 1 - s(x), s'(x)
  __device__ explicit Sigmoid(T x) {
    const T e = exp(-fabs(x)), large = T(1) / (T(1) + e), small = e * large;
    s = x < T(0) ? small : large;
    rest = x < T(0) ? large : small;
    slope = large * small;
  }
};

template <class T>
__device__ __forceinline__ Derivatives<T> sigmoid_derivatives(T x, T) {
  const Sigmoid<T> s(x);
  return {s.s, s.slope, s.slope * (s.rest - s.s)};
}

template <class T>
__device__ __forceinline__ Derivatives<T> silu_derivatives(T x, T) {
  const Sigmoid<T> s(x);
  return {x * s.s, s.s + x * s.slope, s.slope * (T(2) + x * (s.rest - s.s))};
}

// At 0 torch has f' = alpha and f'' = 0.
template <class T>
__device__ __forceinline__ Derivatives<T> elu_derivatives(T x, T alpha) {
  if (!(x <= T(0))) return {x, T(1), T(0)};
  const T e = alpha * exp(x);
  return {alpha * expm1(x), e, x < T(0) ? e : T(0)};
}

template <class T>
__device__ __forceinline__ Derivatives<T> gelu_derivatives(T x, T) {
  const T cdf = T(0.5) * erfc(-x * T(0.70710678118654752440)), pdf = T(0.39894228040143267794) * exp(T(-0.5) * x * x);
  return {x * cdf, cdf + x * pdf, pdf * (T(2) - x * x)};
}

template <class T>
__device__ __forceinline__ Derivatives<T> gelu_tanh_derivatives(T x, T) {
  const T k = T(0.79788456080286535588), c = T(0.044715);
  const T u = k * (x + c * x * x * x), u1 = k * (T(1) + T(3) * c * x * x), u2 = T(6) * k * c * x;
  const Derivatives<T> t = tanh_derivatives(u);
  const T e = exp(T(-2) * fabs(u)), cdf = (u < T(0) ? e : T(1)) / (T(1) + e);  // (1 + tanh u) / 2
  const T half = T(0.5) * x;
  return {x * cdf, cdf + half * t.first * u1, t.first * u1 + half * (t.first * u2 + t.second * u1 * u1)};
}

enum class Smooth {
#define X(name, key) name,
  FASTMAML_SMOOTH(X)
#undef X
};

template <class T>
struct SmoothFunction {
  Smooth kind;
  T number;

  __device__ T value(T x) const { return derivatives(x).f; }
  __device__ T times_first(T x, T d) const { return derivatives(x).first * d; }

  __device__ Derivatives<T> derivatives(T x) const {
    switch (kind) {
#define X(name, key) \
  case Smooth::name: \
    return name##_derivatives(x, number);
      FASTMAML_SMOOTH(X)
#undef X
    }
    no_such_case();
  }
};

// y = f(x)
template <class Function>
struct PointwiseFwd {
  static constexpr int kOut = 1, kIn = 1;
  Function function;
  template <class T>
  __device__ void operator()(T (&y)[1], const T (&x)[1]) const {
    y[0] = function.value(x[0]);
  }
};

// f'(x) d: the tangent of the forward pass, and the backward pass.
template <class Function>
struct PointwiseTimesFirst {
  static constexpr int kOut = 1, kIn = 2;
  Function function;
  template <class T>
  __device__ void operator()(T (&out)[1], const T (&x)[2]) const {
    out[0] = function.times_first(x[0], x[1]);
  }
};

// dx' = f'(x) dy' + f''(x) x' dy
template <class T>
struct SmoothBwdJvp {
  static constexpr int kOut = 1, kIn = 4;
  SmoothFunction<T> function;
  __device__ void operator()(T (&dx_dot)[1], const T (&in)[4]) const {
    const T x = in[0], x_dot = in[1], dy = in[2], dy_dot = in[3];
    const Derivatives<T> f = function.derivatives(x);
    dx_dot[0] = f.first * dy_dot + f.second * x_dot * dy;
  }
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
