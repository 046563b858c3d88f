// Conjugate gradients on A s = v with A = (1 + damping) I + H / lam (ALGORITHMS 2.5): a block for every task, which stops alone.
// s, r, p, v, hp [size]   state [r.r, v.v, active, steps taken, negative curvature]   history [1]: |r| / |v| after this kernel
// settings [lam, damping, stop]
#pragma once

#include "cuda/kernels/operands.cuh"
#include "cuda/kernels/reduce.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

// body(wide, i, count) for every chunk i .. i + count - 1 of the vector, shared out among the block's threads.
template <class T, class Body>
__device__ __forceinline__ void for_chunks(int size, bool wide, Body body) {
  constexpr int n = kChunk<T>;
  for (int i = threadIdx.x * n; i < size; i += blockDim.x * n) {
    const int count = size - i < n ? size - i : n;
    body(wide && count == n, i, count);
  }
}

template <class T>
__device__ __forceinline__ Chunk<T> chunk_at(const T* x, bool wide, int i, int count) {
  return wide ? load<true, kChunk<T>>(x + i, count) : load<false, kChunk<T>>(x + i, count);
}

template <class T>
__device__ __forceinline__ void put_chunk(T* x, const Chunk<T>& chunk, bool wide, int i, int count) {
  wide ? store<true>(x + i, chunk, count) : store<false>(x + i, chunk, count);
}

// A chunk's products are summed in T, chunks in double.
template <class T>
__device__ __forceinline__ double dot(const Chunk<T>& a, const Chunk<T>& b) {
  T sum = T(0);
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) sum += a.at[j] * b.at[j];
  return double(sum);
}

// |r| / |v|, the relative error of A s = v; 0 for v = 0
template <class T>
__device__ __forceinline__ T relative_residual(double rr, double vv) {
  return vv == 0 ? T(0) : T(sqrt(rr) / sqrt(vv));
}

// s = 0,  r = p = v
template <class T>
__device__ __forceinline__ void cg_start_of_task(T* s, T* r, T* p, T* state, T* history, const T* v, int size, bool wide) {
  double vv[1] = {0};
  for_chunks<T>(size, wide, [&](bool wide_here, int i, int count) {
    const Chunk<T> chunk = chunk_at(v, wide_here, i, count);
    put_chunk(s, Chunk<T>{}, wide_here, i, count);
    put_chunk(r, chunk, wide_here, i, count);
    put_chunk(p, chunk, wide_here, i, count);
    vv[0] += dot(chunk, chunk);
  });
  block_sum(vv);
  if (threadIdx.x > 0) return;
  state[0] = state[1] = T(vv[0]);
  state[2] = state[0] == T(0) ? T(0) : T(1);  // a NaN goes on, and shows in the solution
  state[3] = state[4] = T(0);
  history[0] = relative_residual<T>(double(state[0]), double(state[1]));
}
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    cg_start(PerTask<T> s, PerTask<T> r, PerTask<T> p, PerTask<T> state, PerTask<T> history, PerTask<const T> v, int size, bool wide) {
  const int64_t task = blockIdx.x;
  cg_start_of_task(s.of(task), r.of(task), p.of(task), state.of(task), history.of(task), v.of(task), size, wide);
}

// alpha = r.r / p.Ap,  s += alpha p,  r' = r - alpha Ap,  p = r' + (r'.r' / r.r) p.
// Ends where p.Ap <= 0 (s stays) or where r.r < stop.
template <class T>
__device__ __forceinline__ void cg_step_of_task(T* s, T* r, T* p, T* state, T* history, const T* hp, const T* settings, int size,
                                                bool wide) {
  const double rr = double(state[0]), vv = double(state[1]);
  const bool active = state[2] != T(0);
  if (threadIdx.x == 0) history[0] = relative_residual<T>(rr, vv);
  if (!active) return;
  const T over = T(1) / settings[0], diagonal = T(1) + settings[1];
  const auto Ap_at = [&](const Chunk<T>& p_here, bool wide_here, int i, int count) {
    Chunk<T> Ap = chunk_at(hp, wide_here, i, count);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) Ap.at[j] = diagonal * p_here.at[j] + Ap.at[j] * over;
    return Ap;
  };

  double curvature[1] = {0};
  for_chunks<T>(size, wide, [&](bool wide_here, int i, int count) {
    const Chunk<T> p_here = chunk_at<T>(p, wide_here, i, count);
    curvature[0] += dot(p_here, Ap_at(p_here, wide_here, i, count));
  });
  block_sum(curvature);
  if (curvature[0] <= 0) {
    if (threadIdx.x > 0) return;
    state[2] = T(0);
    state[4] = T(1);
    return;
  }
  const T alpha = T(rr / curvature[0]);

  double next[1] = {0};
  for_chunks<T>(size, wide, [&](bool wide_here, int i, int count) {
    const Chunk<T> p_here = chunk_at<T>(p, wide_here, i, count), Ap = Ap_at(p_here, wide_here, i, count);
    Chunk<T> s_here = chunk_at<T>(s, wide_here, i, count), r_here = chunk_at<T>(r, wide_here, i, count);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      s_here.at[j] += alpha * p_here.at[j];
      r_here.at[j] -= alpha * Ap.at[j];
    }
    put_chunk(s, s_here, wide_here, i, count);
    put_chunk(r, r_here, wide_here, i, count);
    next[0] += dot(r_here, r_here);
  });
  block_sum(next);
  const T beta = T(next[0] / rr);
  for_chunks<T>(size, wide, [&](bool wide_here, int i, int count) {
    const Chunk<T> r_here = chunk_at<T>(r, wide_here, i, count);
    Chunk<T> p_here = chunk_at<T>(p, wide_here, i, count);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) p_here.at[j] = r_here.at[j] + beta * p_here.at[j];
    put_chunk(p, p_here, wide_here, i, count);
  });
  if (threadIdx.x > 0) return;
  const T after = T(next[0]);
  state[0] = after;
  state[2] = after < settings[2] || after == T(0) ? T(0) : T(1);
  state[3] += T(1);
  history[0] = relative_residual<T>(double(after), vv);
}
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) cg_step(PerTask<T> s, PerTask<T> r, PerTask<T> p, PerTask<T> state, PerTask<T> history,
                                                    PerTask<const T> hp, PerTask<const T> settings, int size, bool wide) {
  const int64_t task = blockIdx.x;
  cg_step_of_task(s.of(task), r.of(task), p.of(task), state.of(task), history.of(task), hp.of(task), settings.of(task), size, wide);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
