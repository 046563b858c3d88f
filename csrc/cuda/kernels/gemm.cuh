// Products of row-major matrices, as Forms of gemm_tile.cuh: Gemm<order of a, order of b>.
//   nn: Gemm<along_k, along_rows>      nt: Gemm<along_k, along_k>      tn: Gemm<along_rows, along_rows>
#pragma once

#include "cuda/kernels/gemm_tile.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

// Element (row, k) of a tile that starts at first_row: at row * ld + k (along_k) or at k * ld + row (along_rows).
template <Order order>
struct Matrix {
  static constexpr Order kOrder = order;
  using Row = int;
  using K = int;
  int first_row, rows, depth, ld;

  __device__ Row row(int r) const { return first_row + r; }
  __device__ K at_k(int k) const { return k; }
  static __device__ void step(int& at, int n) { at += n; }
  __device__ bool find(Row row, K k, int& from) const {
    from = order == Order::along_k ? row * ld + k : k * ld + row;
    return row < rows && k < depth;
  }
};

template <Order order_a, Order order_b>
struct Gemm {
  static constexpr bool kSums = order_a == Order::along_rows;  // weight gradients, which have a bias gradient
  static constexpr int kTable = 0;
  int rows, cols, depth;

  int row_tiles(int tile_rows) const { return (rows + tile_rows - 1) / tile_rows; }

  template <class Tile>
  struct Block {
    using A = Matrix<order_a>;
    using B = Matrix<order_b>;
    const A a;
    const B b;
    const int depth, cols, first_col;

    __device__ Block(const Gemm& g, int row_tile, int col_tile, void*)
        : a{row_tile * Tile::kRows, g.rows, g.depth, order_a == Order::along_k ? g.depth : g.rows},
          b{col_tile * Tile::kCols, g.cols, g.depth, order_b == Order::along_k ? g.depth : g.cols},
          depth(g.depth),
          cols(g.cols),
          first_col(b.first_row) {}
    __device__ bool empty() const { return false; }
    __device__ int out_row(int r) const { return a.first_row + r < a.rows ? a.first_row + r : -1; }
  };
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
