// The tile engine on tensor cores (sm_80 and later): TensorProduct takes TileProduct's place in gemm_tile.cuh's kernel. float32 operands
// are rounded to TF32 (10 bits of mantissa) or, three times as much work, split into a sum of two such numbers, which keeps 21 bits.
#pragma once

#include "cuda/kernels/gemm_tile.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

// A block's tile of `out`, and the share of each of its warps.
template <int rows, int cols, int warp_rows, int warp_cols>
struct TensorTile {
  static constexpr int kRows = rows, kCols = cols, kWarpRows = warp_rows, kWarpCols = warp_cols;
  static constexpr int kThreads = (rows / warp_rows) * (cols / warp_cols) * 32;
};

// A number as tensor cores take it: high + low (split), or high alone.
template <bool split, int n>
struct TensorNumbers {
  uint32_t high[n], low[split ? n : 1];

  __device__ void set(int i, float x) {
    high[i] = to_tf32(x);
    if constexpr (split) low[i] = to_tf32(x - __uint_as_float(high[i]));
  }
};

template <class Tile_, class Form_, bool dual, bool split>
struct TensorProduct {
  using T = float;
  using Tile = Tile_;
  using Form = Form_;
  using Block = typename Form::template Block<Tile>;
  using A = Operand<T, typename Block::A, Tile::kRows, kChunk<T>, Tile::kThreads>;
  using B = Operand<T, typename Block::B, Tile::kCols, kChunk<T>, Tile::kThreads>;
  static constexpr int kSets = dual ? 2 : 1;
  static constexpr int kStage = kSets * (A::kSize + B::kSize);
  static constexpr size_t kTableBytes = Form::kTable * Tile::kRows * 16, kSharedBytes = kTableBytes + 2 * kStage * sizeof(T);

  // A warp's 16 x 8 pieces, as device.h's mma_m16n8k8_tf32 lays them out.
  static constexpr int kDown = Tile::kWarpRows / 16, kAcross = Tile::kWarpCols / 8;
  using Sum = T[kDown][kAcross][4];

  static __device__ int first_row() { return threadIdx.x / 32 / (Tile::kCols / Tile::kWarpCols) * Tile::kWarpRows + threadIdx.x % 32 / 4; }
  static __device__ int first_col() { return threadIdx.x / 32 % (Tile::kCols / Tile::kWarpCols) * Tile::kWarpCols; }

  using Pieces_A = TensorNumbers<split, 4>[kDown];
  using Pieces_B = TensorNumbers<split, 2>[kAcross];

  static __device__ void read(Pieces_A& a, const T* tile, int k) {
#pragma unroll
    for (int m = 0; m < kDown; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m].set(i, A::at(tile, first_row() + m * 16 + i % 2 * 8, k + threadIdx.x % 4 + i / 2 * 4));
  }
  static __device__ void read(Pieces_B& b, const T* tile, int k) {
#pragma unroll
    for (int n = 0; n < kAcross; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) b[n].set(i, B::at(tile, first_col() + n * 8 + threadIdx.x % 32 / 4, k + threadIdx.x % 4 + i * 4));
  }

  static __device__ void add_products(Sum& sum, const Pieces_A& a, const Pieces_B& b) {
#pragma unroll
    for (int m = 0; m < kDown; ++m)
#pragma unroll
      for (int n = 0; n < kAcross; ++n) {
        if constexpr (split) {  // the small products first
          mma_m16n8k8_tf32(sum[m][n], a[m].low, b[n].high);
          mma_m16n8k8_tf32(sum[m][n], a[m].high, b[n].low);
        }
        mma_m16n8k8_tf32(sum[m][n], a[m].high, b[n].high);
      }
  }

  static __device__ void add_tile(Sum (&sum)[kSets], const T* tile) {
    const T* b_tile = tile + kSets * A::kSize;
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      Pieces_A a;
      Pieces_B b;
      read(a, tile, k);
      read(b, b_tile, k);
      add_products(sum[0], a, b);
      if constexpr (dual) {
        Pieces_A other_a;
        Pieces_B other_b;
        read(other_b, b_tile + B::kSize, k);
        add_products(sum[1], a, other_b);
        read(other_a, tile + A::kSize, k);
        add_products(sum[1], other_a, b);
      }
    }
  }

  static __device__ void write(const Block& block, const Sum& sum, T* out, const T* bias, bool wide) {
#pragma unroll
    for (int m = 0; m < kDown; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = block.out_row(first_row() + m * 16 + half * 8);
        if (row < 0) continue;
        T* line = out + int64_t(row) * block.cols;
#pragma unroll
        for (int n = 0; n < kAcross; ++n) {
          const int col = block.first_col + first_col() + n * 8 + threadIdx.x % 4 * 2;
          Chunk<T, 2> pair;
#pragma unroll
          for (int e = 0; e < 2; ++e) pair.at[e] = sum[m][n][half * 2 + e] + (bias && col + e < block.cols ? bias[col + e] : T(0));
          if (wide && col < block.cols)
            store<true>(line + col, pair, 2);
          else
            store<false>(line + col, pair, block.cols - col);
        }
      }
  }
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
