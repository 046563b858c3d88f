// [rows, C] with a few numbers for every column: sums over the rows, and maps that know their channel.
// A block takes (task, part of the rows, group of channels). A thread takes a chunk of channels and every row_lanes-th row of the part.
#pragma once

#include "cuda/kernels/operands.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

inline constexpr int kColumnThreads = 256;  // at most

struct Columns {
  int rows, C;
  int lanes, row_lanes;  // threads side by side (a chunk each), and threads one below the other; row_lanes is a power of two
  int part_rows;
};

template <class T>
struct ColumnThread {
  int lane, row_lane;
  int c, count;        // its channels c .. c + count - 1; the last group may have threads without channels
  int row, end, step;  // its rows

  __device__ explicit ColumnThread(const Columns& s) : ColumnThread(s, blockIdx.y, blockIdx.z) {}
  // part: of the rows; group: of channels. Threads beyond lanes x row_lanes have no channels.
  __device__ ColumnThread(const Columns& s, int part, int group)
      : lane(threadIdx.x % s.lanes), row_lane(threadIdx.x / s.lanes), c((group * s.lanes + lane) * kChunk<T>), step(s.row_lanes) {
    count = c < s.C && row_lane < s.row_lanes ? min(s.C - c, kChunk<T>) : 0;
    const int first = part * s.part_rows;
    row = first + row_lane;
    end = min(first + s.part_rows, s.rows);
  }
};

// One number for each channel; if absent: `otherwise`.
template <class T>
__device__ __forceinline__ Chunk<T> channels(const T* of_task, int c, int count, T otherwise) {
  Chunk<T> chunk;
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) chunk.at[j] = of_task && j < count ? of_task[c + j] : otherwise;
  return chunk;
}

// ---------------------------------------------------------------- maps

// F has  template <bool kWide> void operator()(int64_t task, const ColumnThread<T>& t) const,  which loops over the rows of t.
template <class T, class F>
__global__ void __launch_bounds__(kColumnThreads) map_columns(F f, Columns s, bool wide) {
  const ColumnThread<T> t(s);
  if (t.count == 0) return;
  if (wide)
    f.template run<true>(blockIdx.x, t);
  else
    f.template run<false>(blockIdx.x, t);
}

// ---------------------------------------------------------------- sums

// A thread sums 32 rows in T, and such sums in double. So the error does not grow with the number of rows.
inline constexpr int kRowsInT = 32;

template <bool kWide, int kUnroll, class T, class F>
__device__ __forceinline__ void add_rows(double (&total)[2][kChunk<T>], const F& f, int64_t task, const ColumnThread<T>& t) {
  const typename F::Channels at(f, task, t.c, t.count);
  for (int row = t.row; row < t.end;) {
    T sum[2][kChunk<T>] = {};
#pragma unroll kUnroll
    for (int k = 0; k < kRowsInT && row < t.end; ++k, row += t.step) at.template add<kWide>(sum, row);
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) total[q][j] += double(sum[q][j]);
  }
}

template <class T>
using ColumnSums = double[2][kChunk<T>][kColumnThreads];  // in shared memory

// The sums of f's two numbers over the thread's rows, for its channels. Results are in `shared`, at threads with row_lane 0.
// F::Channels(f, task, c, count) has  template <bool kWide> void add(T (&sum)[2][kChunk<T>], int row) const.
template <int kUnroll, class T, class F>
__device__ __forceinline__ void sum_columns_of_part(ColumnSums<T>& shared, const F& f, int64_t task, const Columns& s,
                                                    const ColumnThread<T>& t, bool wide) {
  double total[2][kChunk<T>] = {};
  if (wide && t.count > 0)
    add_rows<true, kUnroll>(total, f, task, t);
  else if (t.count > 0)
    add_rows<false, kUnroll>(total, f, task, t);

#pragma unroll
  for (int q = 0; q < 2; ++q)
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) shared[q][j][threadIdx.x] = total[q][j];
  for (int half = s.row_lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t.row_lane < half)
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int j = 0; j < kChunk<T>; ++j) shared[q][j][threadIdx.x] += shared[q][j][threadIdx.x + half * s.lanes];
  }
}

// out[q] [C] = scale times the sum of f's q-th number over the rows. With `parts`: each part's sum, in double [T, parts, 2, C].
template <class T, class F>
__global__ void __launch_bounds__(kColumnThreads)
    sum_columns(F f, PerTask<T> out0, PerTask<T> out1, double scale, double* parts, Columns s, bool wide) {
  __shared__ ColumnSums<T> shared;
  const ColumnThread<T> t(s);
  sum_columns_of_part<4, T>(shared, f, blockIdx.x, s, t, wide);
  if (t.row_lane > 0) return;
#pragma unroll
  for (int j = 0; j < kChunk<T>; ++j) {
    if (j >= t.count) break;
    const double sum[2] = {shared[0][j][threadIdx.x], shared[1][j][threadIdx.x]};
    if (parts) {
      double* const to = parts + (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * 2 * s.C + t.c + j;
      to[0] = sum[0];
      to[s.C] = sum[1];
    } else {
      out0.of(blockIdx.x)[t.c + j] = T(scale * sum[0]);
      out1.of(blockIdx.x)[t.c + j] = T(scale * sum[1]);
    }
  }
}

// Adds up the parts of sum_columns.
template <class T>
__global__ void sum_column_parts(PerTask<T> out0, PerTask<T> out1, double scale, const double* parts, int count, int C) {
  const int i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= 2 * C) return;
  const double* const from = parts + int64_t(blockIdx.x) * count * 2 * C + i;
  double sum = from[0];
  for (int part = 1; part < count; ++part) sum += from[int64_t(part) * 2 * C];
  (i < C ? out0.of(blockIdx.x) + i : out1.of(blockIdx.x) + (i - C))[0] = T(scale * sum);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
