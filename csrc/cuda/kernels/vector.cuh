// Flat vectors, and the transposition behind flatten.
#pragma once

#include "cuda/kernels/map.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

struct Copy {  // an absent operand copies as zeros
  static constexpr int kOut = 1, kIn = 1;
  template <class T>
  __device__ void operator()(T (&out)[1], const T (&x)[1]) const {
    out[0] = x[0];
  }
};

struct Sum {
  static constexpr int kOut = 1, kIn = 2;
  template <class T>
  __device__ void operator()(T (&out)[1], const T (&x)[2]) const {
    out[0] = x[0] + x[1];
  }
};

inline constexpr int kTransposeRows = 128, kTransposeCols = 32;

// out [N, cols, rows] = x [N, rows, cols]. Tiles go through shared memory, so that reads and writes both follow lines.
template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) transpose(PerTask<T> out, PerTask<const T> x, int N, int rows, int cols) {
  __shared__ T tile[kTransposeRows * (kTransposeCols + 1)];
  const int col_tiles = (cols + kTransposeCols - 1) / kTransposeCols, row_tiles = (rows + kTransposeRows - 1) / kTransposeRows;
  for (int place = blockIdx.y; place < N * row_tiles * col_tiles; place += gridDim.y) {
    const int first_col = place % col_tiles * kTransposeCols, first_row = place / col_tiles % row_tiles * kTransposeRows;
    const int here_cols = min(kTransposeCols, cols - first_col), here_rows = min(kTransposeRows, rows - first_row);
    const int64_t image = int64_t(place / col_tiles / row_tiles) * rows * cols;
    const T* const from = x.of(blockIdx.x) + image + int64_t(first_row) * cols + first_col;
    T* const to = out.of(blockIdx.x) + image + int64_t(first_col) * rows + first_row;
    for (int i = threadIdx.x; i < here_rows * here_cols; i += kThreads) {
      const int row = i / here_cols, col = i % here_cols;
      tile[row * (kTransposeCols + 1) + col] = from[int64_t(row) * cols + col];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < here_rows * here_cols; i += kThreads) {
      const int col = i / here_rows, row = i % here_rows;
      to[int64_t(col) * rows + row] = tile[row * (kTransposeCols + 1) + col];
    }
    __syncthreads();
  }
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
