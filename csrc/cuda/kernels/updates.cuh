// Plain descent and its adjoint, as functions of kernels/map.cuh (ALGORITHMS 1.1); and the sum over tasks.
#pragma once

#include "cuda/kernels/map.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

// phi_next = phi - rate g
struct SgdUpdate {
  static constexpr int kOut = 1, kIn = 3;
  template <class T>
  __device__ void operator()(T (&phi_next)[1], const T (&x)[3]) const {
    const T phi = x[0], g = x[1], rate = x[2];
    phi_next[0] = phi - rate * g;
  }
};

// u = rate lambda
struct ScaleByRate {
  static constexpr int kOut = 1, kIn = 2;
  template <class T>
  __device__ void operator()(T (&u)[1], const T (&x)[2]) const {
    u[0] = x[0] * x[1];
  }
};

// rate_grad -= g lambda
struct RateGrad {
  static constexpr int kOut = 1, kIn = 3;
  template <class T>
  __device__ void operator()(T (&rate_grad)[1], const T (&x)[3]) const {
    rate_grad[0] = x[0] - x[1] * x[2];
  }
};

// lambda -= hu
struct AdjointUpdate {
  static constexpr int kOut = 1, kIn = 2;
  template <class T>
  __device__ void operator()(T (&lambda)[1], const T (&x)[2]) const {
    lambda[0] = x[0] - x[1];
  }
};

// rate_grad -= g lambda;  lambda -= hu;  u = rate lambda
struct SgdAdjoint {
  static constexpr int kOut = 3, kIn = 5;
  template <class T>
  __device__ void operator()(T (&out)[3], const T (&x)[5]) const {
    const T lambda = x[0], rate_grad = x[1], hu = x[2], g = x[3], rate = x[4];
    out[0] = lambda - hu;
    out[1] = rate_grad - g * lambda;
    out[2] = rate * out[0];
  }
};

// ---------------------------------------------------------------- tree_reduce

// Sums one element of x [T, size] over tasks first .. first + count - 1, as a binary tree over task numbers: neighbours first.
// `first` must be a multiple of a power of two that is at least `count`.
template <class T>
class TaskTree {
 public:
  const T* x;
  const T* weight;  // null means one
  int64_t size;

  __device__ T sum(int64_t first, int64_t count, int64_t i) const {
    // `waiting[h]` holds a sum of 8 * 2^h tasks until its sibling is done.
    T waiting[kHeights];
    int64_t eights = 0;
    for (; eights * kLeaves < count; ++eights) {
      const int64_t left = count - eights * kLeaves;
      T total = leaves(first + eights * kLeaves, left < kLeaves ? int(left) : kLeaves, i);
      bool rising = true;
#pragma unroll
      for (int h = 0; h < kHeights; ++h)  // no break, which would move `waiting` out of registers
        if (rising && (eights >> h & 1)) {
          total = waiting[h] + total;
        } else if (rising) {
          waiting[h] = total;
          rising = false;
        }
    }
    T total = T(0);
    bool some = false;
#pragma unroll
    for (int h = 0; h < kHeights; ++h)
      if (eights >> h & 1) {
        total = some ? waiting[h] + total : waiting[h];
        some = true;
      }
    return total;
  }

 private:
  static constexpr int kLeaves = 8, kHeights = 20;

  __device__ T leaves(int64_t first, int count, int64_t i) const {
    T leaf[kLeaves];
#pragma unroll
    for (int t = 0; t < kLeaves; ++t) {
      leaf[t] = t < count ? x[(first + t) * size + i] : T(0);
      if (weight && t < count) leaf[t] *= weight[first + t];
    }
#pragma unroll
    for (int stride = 1; stride < kLeaves; stride *= 2)
#pragma unroll
      for (int t = 0; t + stride < kLeaves; t += 2 * stride)
        if (t + stride < count) leaf[t] += leaf[t + stride];
    return leaf[0];
  }
};

// out [size] = the sum of x over the tasks, or the mean without weights. Thread (i, s) sums slice s of the tasks, a subtree.
// `slice` is a power of two, at least 8.
template <class T, int kColumns, int kSlices>
__global__ void __launch_bounds__(kColumns* kSlices)
    tree_reduce(T* out, const T* x, const T* weight, int64_t tasks, int64_t size, int64_t slice) {
  __shared__ T sums[kSlices][kColumns];
  const int64_t i = int64_t(blockIdx.x) * kColumns + threadIdx.x, first = threadIdx.y * slice, left = tasks - first;
  if (i < size && left > 0) sums[threadIdx.y][threadIdx.x] = TaskTree<T>{x, weight, size}.sum(first, left < slice ? left : slice, i);
#pragma unroll
  for (int stride = 1; stride < kSlices; stride *= 2) {
    __syncthreads();
    if (i < size && threadIdx.y % (2 * stride) == 0 && (threadIdx.y + stride) * slice < tasks)
      sums[threadIdx.y][threadIdx.x] += sums[threadIdx.y + stride][threadIdx.x];
  }
  if (i < size && threadIdx.y == 0) out[i] = weight ? sums[0][threadIdx.x] : sums[0][threadIdx.x] / T(tasks);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
