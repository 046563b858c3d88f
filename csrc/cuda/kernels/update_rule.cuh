// Inner optimizers other than plain descent: axpy, the proximal term, clipping, momentum, Adam, and the adjoints (ALGORITHMS 1.2 to 1.4).
// They are functions of kernels/map.cuh, some with one number for each task. u, p and r are MINUS the adjoints.
#pragma once

#include "cuda/kernels/conjugate_gradient.cuh"
#include "cuda/kernels/map.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

// y += factor alpha x
template <class T>
struct AxpyBy {
  static constexpr int kOut = 1, kIn = 2;
  T factor;
  T number = T(1);  // alpha
  __device__ void begin() { factor *= number; }
  __device__ void operator()(T (&y)[1], const T (&x)[2]) const { y[0] = x[0] + factor * x[1]; }
};

// g += lam (phi - theta)
template <class T>
struct ProximalBy {
  static constexpr int kOut = 1, kIn = 3;
  T number = T(0);  // lam
  __device__ void begin() {}
  __device__ void operator()(T (&g)[1], const T (&x)[3]) const { g[0] = x[0] + number * (x[1] - x[2]); }
};

// clipped = g between -limit and limit; NaN stays
template <class T>
struct ClipValue {
  static constexpr int kOut = 1, kIn = 1;
  T limit;
  __device__ void operator()(T (&clipped)[1], const T (&g)[1]) const { clipped[0] = g[0] > limit ? limit : g[0] < -limit ? -limit : g[0]; }
};

// u_raw = u where |g| <= limit, else 0
template <class T>
struct ClipValueAdjoint {
  static constexpr int kOut = 1, kIn = 2;
  T limit;
  __device__ void operator()(T (&u_raw)[1], const T (&x)[2]) const {
    const T u = x[0], g = x[1];
    u_raw[0] = g >= -limit && g <= limit ? u : T(0);
  }
};

// b_next = momentum b + (1 - dampening) g, or g in the first step;  d = b_next, or g + momentum b_next;  phi_next = phi - rate d
template <class T>
struct MomentumUpdate {
  static constexpr int kOut = 3, kIn = 4;
  T momentum, keep;  // keep = 1 - dampening
  bool nesterov, first;
  __device__ void operator()(T (&out)[3], const T (&x)[4]) const {
    const T phi = x[0], g = x[1], rate = x[2], b = x[3];
    const T average = first ? g : momentum * b + keep * g;
    const T d = nesterov ? g + momentum * average : average;
    out[0] = phi - rate * d;
    out[1] = average;
    out[2] = d;
  }
};

// With v = rate lambda:  p += v (nesterov: momentum v);  u = keep p, or p in the first step (nesterov: + v);  p *= momentum
template <class T>
struct MomentumAdjoint {
  static constexpr int kOut = 2, kIn = 3;
  T momentum, keep;
  bool nesterov, first;
  __device__ void operator()(T (&out)[2], const T (&x)[3]) const {
    const T v = x[1] * x[2], p = x[0] + (nesterov ? momentum * v : v);
    out[0] = (first ? p : keep * p) + (nesterov ? v : T(0));
    out[1] = momentum * p;
  }
};

// m_next = beta1 m + (1 - beta1) g,  s_next = beta2 s + (1 - beta2) g^2,  phi_next = phi - rate (mh / (sqrt(sh) + eps) + decay phi)
// with mh = m_next / c1, sh = s_next / c2, c = 1 - beta^t in the t-th step. `number`: steps before this loop.
template <class T>
struct AdamUpdate {
  static constexpr int kOut = 3, kIn = 5;
  double beta1, beta2, step;  // step: within this loop, from 1
  T eps, decay;
  T number = T(0), over_c1 = T(0), over_c2 = T(0);
  __device__ void begin() {
    over_c1 = T(1 / (1 - pow(beta1, step + double(number))));
    over_c2 = T(1 / (1 - pow(beta2, step + double(number))));
  }
  __device__ void operator()(T (&out)[3], const T (&x)[5]) const {
    const T phi = x[0], g = x[1], rate = x[2], m = x[3], s = x[4];
    const T first = T(beta1) * m + T(1 - beta1) * g, second = T(beta2) * s + T(1 - beta2) * g * g;
    out[0] = phi - rate * (first * over_c1 / (sqrt(second * over_c2) + eps) + decay * phi);
    out[1] = first;
    out[2] = second;
  }
};

// With v = rate lambda, D = sqrt(sh) + eps:
//   rate_grad -= (mh / D + decay phi) lambda;  p += v / (c1 D);  r -= v mh / (2 sqrt(sh) D^2 c2), unchanged where sh is 0;
//   u = (1 - beta1) p + (1 - beta2) 2 g r;  lambda -= decay v;  p *= beta1;  r *= beta2
template <class T>
struct AdamAdjoint {
  static constexpr int kOut = 5, kIn = 9;
  T beta1, beta2, over_c1, over_c2, eps, decay;
  __device__ void operator()(T (&out)[5], const T (&x)[9]) const {
    const T lambda = x[0], phi = x[4], g = x[5], rate = x[6];
    const T v = rate * lambda, mh = x[7] * over_c1, root = sqrt(x[8] * over_c2), D = root + eps;
    const T p = x[1] + v * over_c1 / D;
    const T r = root == T(0) ? x[2] : x[2] - v * (mh / root) / D / D * (over_c2 / T(2));
    out[0] = (T(1) - beta1) * p + (T(1) - beta2) * T(2) * g * r;
    out[1] = lambda - decay * v;
    out[2] = beta1 * p;
    out[3] = beta2 * r;
    out[4] = x[3] - (mh / D + decay * phi) * lambda;
  }
};

// ---------------------------------------------------------------- clipping by the norm: a block for each task (..._of_task)

// The squared norm of g over the entries that count, and <g, u> over all. Every thread gets both.
template <class T>
__device__ __forceinline__ void clip_sums(double (&sums)[2], const T* g, const T* u, const T* mask, int size, bool wide) {
  sums[0] = sums[1] = 0;
  for_chunks<T>(size, wide, [&](bool wide_here, int i, int count) {
    const Chunk<T> all = chunk_at(g, wide_here, i, count);
    Chunk<T> counted = all;
    if (mask) {
      const Chunk<T> here = chunk_at(mask, wide_here, i, count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j)
        if (here.at[j] == T(0)) counted.at[j] = T(0);
    }
    sums[0] += dot(counted, counted);
    if (u) sums[1] += dot(all, chunk_at(u, wide_here, i, count));
  });
  block_sum(sums);
}

// n = |g|,  clipped = limit / n g where n > limit, else g
template <class T>
__device__ __forceinline__ void clip_norm_of_task(T* clipped, const T* g, const T* mask, double limit, int size, bool wide) {
  double sums[2];
  clip_sums<T>(sums, g, nullptr, mask, size, wide);
  const double n = sqrt(sums[0]);
  const T scale = n > limit ? T(limit / n) : T(1);
  for_chunks<T>(size, wide, [&](bool wide_here, int i, int count) {
    Chunk<T> here = chunk_at(g, wide_here, i, count);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) here.at[j] *= scale;
    put_chunk(clipped, here, wide_here, i, count);
  });
}
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    clip_norm(PerTask<T> clipped, PerTask<const T> g, PerTask<const T> mask, double limit, int size, bool wide) {
  const int64_t task = blockIdx.x;
  clip_norm_of_task(clipped.of(task), g.of(task), mask.of(task), limit, size, wide);
}

// u_raw = limit / n (u - ghat <ghat, u>) with ghat = g / n, where n > limit; the entries that do not count are scaled too
template <class T>
__device__ __forceinline__ void clip_norm_adjoint_of_task(T* u_raw, const T* u, const T* g, const T* mask, double limit, int size,
                                                          bool wide) {
  double sums[2];
  clip_sums<T>(sums, g, u, mask, size, wide);
  const double n = sqrt(sums[0]);
  const bool clips = n > limit;
  const T scale = clips ? T(limit / n) : T(1), along = clips ? T(sums[1] / sums[0]) : T(0);
  for_chunks<T>(size, wide, [&](bool wide_here, int i, int count) {
    Chunk<T> here = chunk_at(u, wide_here, i, count), part = chunk_at(g, wide_here, i, count);
    if (mask) {
      const Chunk<T> counts = chunk_at(mask, wide_here, i, count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j)
        if (counts.at[j] == T(0)) part.at[j] = T(0);
    }
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) here.at[j] = scale * (here.at[j] - part.at[j] * along);
    put_chunk(u_raw, here, wide_here, i, count);
  });
}
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    clip_norm_adjoint(PerTask<T> u_raw, PerTask<const T> u, PerTask<const T> g, PerTask<const T> mask, double limit, int size, bool wide) {
  const int64_t task = blockIdx.x;
  clip_norm_adjoint_of_task(u_raw.of(task), u.of(task), g.of(task), mask.of(task), limit, size, wide);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
