// Losses: a weighted sum over examples (weight 1/N by default) and its gradient by the output z [N, size].
// Computed in double. This costs little, and every backward pass starts from the loss's gradient.
#pragma once

#include "cuda/kernels/operands.cuh"
#include "cuda/kernels/reduce.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

struct Examples {
  int N, size;  // classes, or outputs of an example
  int lanes;    // threads that share an example: a power of two, at most a warp
};

template <class T>
__device__ __forceinline__ double example_weight(const T* weights, int n, int N) {
  return weights ? double(weights[n]) : 1.0 / double(N);
}

// The sum over an example's lanes. Every lane gets the same bits.
__device__ __forceinline__ double lane_sum(double x, int lanes) {
  for (int with = lanes / 2; with > 0; with /= 2) x += __shfl_xor_sync(0xffffffffu, x, with);
  return x;
}
__device__ __forceinline__ double lane_max(double x, int lanes) {
  for (int with = lanes / 2; with > 0; with /= 2) {
    const double other = __shfl_xor_sync(0xffffffffu, x, with);
    x = other > x ? other : x;
  }
  return x;
}

// The softmax of one example's outputs. All lanes of the warp must call this together; `count` is 0 for a missing example.
template <class T>
struct Softmax {
  double largest, total;

  __device__ Softmax(const T* z, int lane, int lanes, int count) {
    double most = count ? double(z[0]) : 0, sum = 0;
    for (int c = lane; c < count; c += lanes) most = double(z[c]) > most ? double(z[c]) : most;
    largest = lane_max(most, lanes);
    for (int c = lane; c < count; c += lanes) sum += exp(double(z[c]) - largest);
    total = lane_sum(sum, lanes);
  }
  __device__ double p(T z) const { return exp(double(z) - largest) / total; }
  __device__ double log_p(T z) const { return double(z) - largest - log(total); }
};

// Calls body(n, lane, exists) for the examples of this block's threads. The lanes of a warp stay together.
template <class Body>
__device__ __forceinline__ void for_examples(const Examples& s, int first, int step, Body body) {
  const int lane = threadIdx.x % s.lanes;
  for (int start = first; start < s.N; start += step) {
    const int n = start + threadIdx.x / s.lanes;
    body(n < s.N ? n : 0, lane, n < s.N);
  }
}

// loss = -sum of w target log p,  dz = w (p - target),  target = (1 - smoothing) onehot + smoothing / classes.    A block for a task.
template <class T>
__device__ __forceinline__ void cross_entropy_of_task(T* loss, T* dz, const T* z, const int64_t* labels, const T* weights, double smoothing,
                                                      const Examples& s) {
  const double spread = smoothing / double(s.size);
  double total[1] = {0};
  for_examples(s, 0, blockDim.x / s.lanes, [&](int n, int lane, bool exists) {
    const int at = n * s.size, count = exists ? s.size : 0;
    const T* const row = z + at;
    const Softmax<T> softmax(row, lane, s.lanes, count);
    const double w = example_weight(weights, n, s.N);
    const int64_t label = labels[n];
    double example = 0;
    for (int c = lane; c < count; c += s.lanes) {
      const double target = (c == label ? 1.0 - smoothing : 0.0) + spread;
      // A class with target 0 adds nothing, even if its log-probability is -inf.
      if (target != 0) example -= target * softmax.log_p(row[c]);
      if (dz) dz[at + c] = T(w * (softmax.p(row[c]) - target));
    }
    total[0] += w * example;
  });
  block_sum(total);
  if (threadIdx.x == 0) loss[0] = T(total[0]);
}
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) cross_entropy(PerTask<T> loss, PerTask<T> dz, PerTask<const T> z, PerTask<const int64_t> labels,
                                                          PerTask<const T> weights, double smoothing, Examples s) {
  const int64_t task = blockIdx.x;
  cross_entropy_of_task(loss.of(task), dz.of(task), z.of(task), labels.of(task), weights.of(task), smoothing, s);
}

// dz' = w p (z' - <p, z'>)     for the examples first, first + step, ...
template <class T>
__device__ __forceinline__ void cross_entropy_jvp_of_task(T* dz_dot, const T* z, const T* z_dot, const T* weights, const Examples& s,
                                                          int first, int step) {
  for_examples(s, first, step, [&](int n, int lane, bool exists) {
    const int at = n * s.size, count = exists ? s.size : 0;
    const T *const row = z + at, *const row_dot = z_dot + at;
    const Softmax<T> softmax(row, lane, s.lanes, count);
    double mean = 0;
    for (int c = lane; c < count; c += s.lanes) mean += softmax.p(row[c]) * double(row_dot[c]);
    mean = lane_sum(mean, s.lanes);
    const double w = example_weight(weights, n, s.N);
    for (int c = lane; c < count; c += s.lanes) dz_dot[at + c] = T(w * softmax.p(row[c]) * (double(row_dot[c]) - mean));
  });
}
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_jvp(PerTask<T> dz_dot, PerTask<const T> z, PerTask<const T> z_dot, PerTask<const T> weights, Examples s) {
  const int64_t task = blockIdx.x;
  const int examples = kThreads / s.lanes;
  cross_entropy_jvp_of_task(dz_dot.of(task), z.of(task), z_dot.of(task), weights.of(task), s, blockIdx.y * examples, gridDim.y * examples);
}

// loss = sum of w mean((z - target)^2),  dz = 2 w (z - target) / size.    A block for a task.
template <class T>
__device__ __forceinline__ void mse_of_task(T* loss, T* dz, const T* z, const T* target, const T* weights, int N, int size) {
  double total[1] = {0};
  for (int i = threadIdx.x; i < N * size; i += blockDim.x) {
    const double w = example_weight(weights, i / size, N) / double(size);
    const double error = double(z[i]) - double(target[i]);
    total[0] += w * error * error;
    if (dz) dz[i] = T(2 * w * error);
  }
  block_sum(total);
  if (threadIdx.x == 0) loss[0] = T(total[0]);
}
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    mse(PerTask<T> loss, PerTask<T> dz, PerTask<const T> z, PerTask<const T> target, PerTask<const T> weights, int N, int size) {
  const int64_t task = blockIdx.x;
  mse_of_task(loss.of(task), dz.of(task), z.of(task), target.of(task), weights.of(task), N, size);
}

// dz' = 2 w z' / size     for the numbers first, first + step, ...
template <class T>
__device__ __forceinline__ void mse_jvp_of_task(T* dz_dot, const T* z_dot, const T* weights, int N, int size, int64_t first, int64_t step) {
  for (int64_t i = first; i < N * size; i += step) {
    const double w = 2 * example_weight(weights, int(i) / size, N) / double(size);
    dz_dot[i] = T(w * double(z_dot[i]));
  }
}
template <class T>
__global__ void mse_jvp(PerTask<T> dz_dot, PerTask<const T> z_dot, PerTask<const T> weights, int N, int size) {
  const int64_t task = blockIdx.x;
  mse_jvp_of_task(dz_dot.of(task), z_dot.of(task), weights.of(task), N, size, int64_t(blockIdx.y) * blockDim.x + threadIdx.x,
                  int64_t(gridDim.y) * blockDim.x);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
