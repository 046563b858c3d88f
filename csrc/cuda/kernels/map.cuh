// The engine of ops that treat all numbers of a task alike: out[i] = f(x[i]) with a few inputs and outputs.
// A function F has kOut, kIn and  void operator()(T (&out)[kOut], const T (&x)[kIn]) const.
#pragma once

#include "cuda/kernels/operands.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

template <class T, class F>
struct MapOperands {
  PerTask<T> out[F::kOut];     // absent: not computed
  PerTask<const T> x[F::kIn];  // absent: zeros.  x may be the same memory as an `out`
};

template <bool kWide, class T, class F>
__device__ __forceinline__ void map_chunk(const F& f, const MapOperands<T, F>& operands, int64_t task, int i, int count) {
  Chunk<T> out[F::kOut], x[F::kIn] = {};
#pragma unroll
  for (int k = 0; k < F::kIn; ++k)
    if (operands.x[k].data) x[k] = load<kWide, kChunk<T>>(operands.x[k].of(task) + i, count);
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) {
    T values[F::kIn], results[F::kOut];
#pragma unroll
    for (int k = 0; k < F::kIn; ++k) values[k] = x[k].at[j];
    f(results, values);
#pragma unroll
    for (int k = 0; k < F::kOut; ++k) out[k].at[j] = results[k];
  }
#pragma unroll
  for (int k = 0; k < F::kOut; ++k)
    if (operands.out[k].data) store<kWide>(operands.out[k].of(task) + i, out[k], count);
}

// The thread's chunks of the task: first, first + step, ...
template <class T, class F>
__device__ __forceinline__ void map_chunks(const F& f, const MapOperands<T, F>& operands, int64_t task, int64_t first, int64_t step,
                                           int size, bool wide) {
  constexpr int n = kChunk<T>;
  for (int64_t i = first * n; i < size; i += step * n) {
    const int count = size - int(i) < n ? size - int(i) : n;
    if (wide && count == n)
      map_chunk<true>(f, operands, task, int(i), n);
    else
      map_chunk<false>(f, operands, task, int(i), count);
  }
}

// A block takes (task, piece of its numbers). A thread takes one chunk, or several if there are not enough blocks.
template <class T, class F>
__global__ void map(F f, MapOperands<T, F> operands, int size, bool wide) {
  map_chunks(f, operands, blockIdx.x, int64_t(blockIdx.y) * blockDim.x + threadIdx.x, int64_t(gridDim.y) * blockDim.x, size, wide);
}

// map for a function with one more number for each task: F::number, which keeps its default if the operand is absent.
template <class T, class F>
__global__ void map_with_number(F f, MapOperands<T, F> operands, PerTask<const T> number, int size, bool wide) {
  if (number.data) f.number = number.of(blockIdx.x)[0];
  f.begin();
  map_chunks(f, operands, blockIdx.x, int64_t(blockIdx.y) * blockDim.x + threadIdx.x, int64_t(gridDim.y) * blockDim.x, size, wide);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
