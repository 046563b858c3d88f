// The ops that treat all numbers of a vector alike (kernels/map.cuh), each said once for every walk: which function it is, where the
// function's outputs, inputs and its one number of the task lie among the op's operands, and its settings.
#pragma once

#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "cuda/kernels/pointwise.cuh"
#include "cuda/kernels/update_rule.cuh"
#include "cuda/kernels/updates.cuh"
#include "cuda/kernels/vector.cuh"
#include "ops/ops.h"

namespace fastmaml::FASTMAML_CUDA_NS {

template <int... places>
struct At {};

// kNumber: -1 where the function takes none.
template <class T_, class Function_, class Outs_, class Ins_, int number = -1>
struct MapOf {
  using T = T_;
  using Function = Function_;
  using Outs = Outs_;
  using Ins = Ins_;
  static constexpr int kNumber = number;
};

// MapOp<T, op>: a MapOf, and the function of a layer.
template <class T, Op op>
struct MapOp;

template <class T>
struct MapOp<T, Op::fill_zero> : MapOf<T, Copy, At<0>, At<>> {
  static Copy function(const Layer&) { return {}; }
};
template <class T>
struct MapOp<T, Op::copy> : MapOf<T, Copy, At<0>, At<1>> {
  static Copy function(const Layer&) { return {}; }
};
template <class T>
struct MapOp<T, Op::add> : MapOf<T, Sum, At<0>, At<1, 2>> {
  static Sum function(const Layer&) { return {}; }
};
template <class T>
struct MapOp<T, Op::sgd_update> : MapOf<T, SgdUpdate, At<0>, At<1, 2, 3>> {
  static SgdUpdate function(const Layer&) { return {}; }
};
template <class T>
struct MapOp<T, Op::scale_by_rate> : MapOf<T, ScaleByRate, At<0>, At<1, 2>> {
  static ScaleByRate function(const Layer&) { return {}; }
};
template <class T>
struct MapOp<T, Op::rate_grad> : MapOf<T, RateGrad, At<0>, At<0, 1, 2>> {
  static RateGrad function(const Layer&) { return {}; }
};
template <class T>
struct MapOp<T, Op::adjoint_update> : MapOf<T, AdjointUpdate, At<0>, At<0, 1>> {
  static AdjointUpdate function(const Layer&) { return {}; }
};
template <class T>
struct MapOp<T, Op::sgd_adjoint> : MapOf<T, SgdAdjoint, At<0, 1, 2>, At<0, 1, 3, 4, 5>> {
  static SgdAdjoint function(const Layer&) { return {}; }
};
template <class T>
struct MapOp<T, Op::axpy> : MapOf<T, AxpyBy<T>, At<0>, At<0, 2>, 1> {
  static AxpyBy<T> function(const Layer& layer) { return {T(std::get<Axpy>(layer).factor)}; }
};
template <class T>
struct MapOp<T, Op::proximal> : MapOf<T, ProximalBy<T>, At<0>, At<0, 2, 3>, 1> {
  static ProximalBy<T> function(const Layer&) { return {}; }
};
template <class T>
struct MapOp<T, Op::clip_value> : MapOf<T, ClipValue<T>, At<0>, At<1>> {
  static ClipValue<T> function(const Layer& layer) { return {T(std::get<Clip>(layer).limit)}; }
};
template <class T>
struct MapOp<T, Op::clip_value_adjoint> : MapOf<T, ClipValueAdjoint<T>, At<0>, At<1, 2>> {
  static ClipValueAdjoint<T> function(const Layer& layer) { return {T(std::get<Clip>(layer).limit)}; }
};
template <class T>
struct MapOp<T, Op::momentum_update> : MapOf<T, MomentumUpdate<T>, At<0, 1, 2>, At<3, 4, 5, 6>> {
  static MomentumUpdate<T> function(const Layer& layer) {
    const Momentum& rule = std::get<Momentum>(layer);
    return {T(rule.momentum), T(1 - rule.dampening), rule.nesterov, rule.first};
  }
};
template <class T>
struct MapOp<T, Op::momentum_adjoint> : MapOf<T, MomentumAdjoint<T>, At<0, 1>, At<1, 2, 3>> {
  static MomentumAdjoint<T> function(const Layer& layer) {
    const Momentum& rule = std::get<Momentum>(layer);
    return {T(rule.momentum), T(1 - rule.dampening), rule.nesterov, rule.first};
  }
};
template <class T>
struct MapOp<T, Op::adam_update> : MapOf<T, AdamUpdate<T>, At<0, 1, 2>, At<3, 4, 5, 6, 7>, 8> {
  static AdamUpdate<T> function(const Layer& layer) {
    const Adam& rule = std::get<Adam>(layer);
    return {rule.beta1, rule.beta2, double(rule.step + 1), T(rule.eps), T(rule.decay)};
  }
};
template <class T>
struct MapOp<T, Op::adam_adjoint> : MapOf<T, AdamAdjoint<T>, At<0, 1, 2, 3, 4>, At<1, 2, 3, 4, 5, 6, 7, 8, 9>> {
  static AdamAdjoint<T> function(const Layer& layer) {
    const Adam& rule = std::get<Adam>(layer);
    const double t = double(rule.step + 1), over_c1 = 1 / (1 - std::pow(rule.beta1, t)), over_c2 = 1 / (1 - std::pow(rule.beta2, t));
    return {T(rule.beta1), T(rule.beta2), T(over_c1), T(over_c2), T(rule.eps), T(rule.decay)};
  }
};

// ---------------------------------------------------------------- pointwise functions: with a kink (ReLU, leaky ReLU), or smooth

template <class T>
struct Rectifying {
  using Function = Rectifier<T>;
  static Rectifier<T> of(const Layer& layer) {
    const Pointwise& s = std::get<Pointwise>(layer);
    switch (s.kind) {
      case Pointwise::Kind::relu:
        return {T(0)};
      case Pointwise::Kind::leaky_relu:
        return {T(s.number)};
#define X(name, key) case Pointwise::Kind::name:
        FASTMAML_SMOOTH(X)
#undef X
        break;
    }
    throw std::logic_error("not a rectifier");
  }
};

template <class T>
struct Smoothing {
  using Function = SmoothFunction<T>;
  static SmoothFunction<T> of(const Layer& layer) {
    const Pointwise& s = std::get<Pointwise>(layer);
    switch (s.kind) {
#define X(name, key)          \
  case Pointwise::Kind::name: \
    return {Smooth::name, T(s.number)};
      FASTMAML_SMOOTH(X)
#undef X
#define X(name, key) case Pointwise::Kind::name:
      FASTMAML_RECTIFIERS(X)
#undef X
      break;
    }
    throw std::logic_error("not a smooth function");
  }
};

// Kind: Rectifying<T> or Smoothing<T>.
template <class T, Op op, class Kind>
struct PointwiseOp;

template <class T, class Kind>
struct PointwiseOp<T, Op::pointwise_fwd, Kind> : MapOf<T, PointwiseFwd<typename Kind::Function>, At<0>, At<1>> {
  static PointwiseFwd<typename Kind::Function> function(const Layer& layer) { return {Kind::of(layer)}; }
};
template <class T, class Kind>
struct PointwiseOp<T, Op::pointwise_bwd, Kind> : MapOf<T, PointwiseTimesFirst<typename Kind::Function>, At<0>, At<1, 2>> {
  static PointwiseTimesFirst<typename Kind::Function> function(const Layer& layer) { return {Kind::of(layer)}; }
};
template <class T, class Kind>
struct PointwiseOp<T, Op::pointwise_fwd_jvp, Kind> : PointwiseOp<T, Op::pointwise_bwd, Kind> {};
template <class T>
struct PointwiseOp<T, Op::pointwise_bwd_jvp, Rectifying<T>> : MapOf<T, PointwiseTimesFirst<Rectifier<T>>, At<0>, At<1, 4>> {
  static PointwiseTimesFirst<Rectifier<T>> function(const Layer& layer) { return {Rectifying<T>::of(layer)}; }
};
template <class T>
struct PointwiseOp<T, Op::pointwise_bwd_jvp, Smoothing<T>> : MapOf<T, SmoothBwdJvp<T>, At<0>, At<1, 2, 3, 4>> {
  static SmoothBwdJvp<T> function(const Layer& layer) { return {Smoothing<T>::of(layer)}; }
};

// How many numbers of a task an op of this file treats.
inline int64_t map_size(const Step& step, const Layer& layer) {
  const auto size = [N = step.examples](const auto& s) -> int64_t {
    using Shape = std::decay_t<decltype(s)>;
    if constexpr (std::is_same_v<Shape, Vector> || std::is_same_v<Shape, Add> || std::is_same_v<Shape, Pointwise>)
      return N * s.size;
    else if constexpr (std::is_same_v<Shape, Axpy> || std::is_same_v<Shape, Clip> || std::is_same_v<Shape, Momentum> ||
                       std::is_same_v<Shape, Adam>)
      return s.size;
    else
      throw std::logic_error("not an op on vectors");
  };
  return std::visit(size, layer);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
