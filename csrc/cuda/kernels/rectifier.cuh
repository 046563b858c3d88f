// ReLU and leaky ReLU, alone (pointwise.cuh) or as a part of another layer.
#pragma once

#include "cuda/device.h"

namespace fastmaml::FASTMAML_CUDA_NS {

// ReLU (slope 0) and leaky ReLU; f'' = 0.
template <class T>
struct Rectifier {
  T slope;

  __device__ T value(T x) const { return x > T(0) ? x : x != x ? x : low(x); }
  // Is f'(x) one? As in torch, NaN counts as positive for a ReLU.
  __device__ bool passes(T x) const { return x > T(0) || (x != x && slope == T(0)); }
  __device__ T times(bool passes, T d) const { return passes ? d : low(d); }
  __device__ T times_first(T x, T d) const { return times(passes(x), d); }

 private:
  __device__ T low(T x) const { return slope == T(0) ? T(0) : slope * x; }  // 0 even for an infinity
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
