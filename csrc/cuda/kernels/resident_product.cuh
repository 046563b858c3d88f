// Products of small matrices by one block:  out [rows, cols] = sum over k of a [rows, k] b [k, cols]. Operands may be in any memory.
// A thread makes a tile in registers: one row or a few, and a chunk of columns. `split` neighbouring threads take chunks of k in turn.
// Shuffles add up their sums. The order of the sum depends on the sizes alone, never on alignment.
#pragma once

#include "cuda/kernels/gemm_tile.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

// Rows of a tall tile. With two sums for each thread there is room for half of them. float64 is for gradient checks: one size.
template <class T, bool dual>
inline constexpr int kTallRows = sizeof(T) == 8 ? 1
                                 : dual         ? kChunk<T> / 2
                                                : kChunk<T>;

struct ResidentTiles {
  int rows, cols, depth;
  bool tall;  // tiles of kTallRows; false: of one row
  int split;  // a power of two
};

// Single: out[0] = a[0] b[0] (+ a[1] b[1], if given) + bias[0].
// Dual:   out[0] = a[0] b[0] + bias[0],  out[1] = a[0] b[1] + a[1] b[0] + bias[1]
template <class T>
struct ResidentProduct {
  T* out[2];
  const T *a[2], *b[2], *bias[2];
  T* sums;  // [cols], the sum of b[0] over k; null in most products
};

template <class T, Order order_a, Order order_b, bool dual, int kRows, bool kWide>
struct TileOfThread {
  static constexpr int kCols = kChunk<T>, kSets = dual ? 2 : 1;
  static constexpr bool kAlongK = order_a == Order::along_k || order_b == Order::along_k;
  static constexpr int kStep = kAlongK ? kChunk<T> : 1;  // k's at a time
  static constexpr bool kWideRows = kWide && order_a == Order::along_rows && kRows == kChunk<T>;
  static constexpr bool kWideCols = kWide && order_b == Order::along_rows;

  const ResidentTiles& s;
  int row, col;  // first row and column
  int stride;    // between the tile's columns; neighbouring threads take neighbouring columns, unless a thread has a chunk

  __device__ TileOfThread(const ResidentTiles& s, int tile, int col_tiles)
      : s(s), row(tile / col_tiles * kRows), col(tile % col_tiles * (kWideCols ? kCols : 1)), stride(kWideCols ? 1 : col_tiles) {}

  // values[e][i] = the element of line(i) at k + e. The operand's k's are neighbours in memory (ld = depth), or its lines are.
  template <Order order, bool kChunkOfLines, int kLines, class Line>
  __device__ void read(T (&values)[kStep][kLines], const T* from, int k, int ld, Line line) const {
    if constexpr (order == Order::along_k) {
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        const Chunk<T> chunk = load<kWide, kChunk<T>>(from + line(i) * ld + k, s.depth - k);
#pragma unroll
        for (int e = 0; e < kStep; ++e) values[e][i] = chunk.at[e];
      }
    } else {
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
        const T* const at_k = from + (k + e) * ld;
        if constexpr (kChunkOfLines) {
          const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(at_k + line(0));
#pragma unroll
          for (int i = 0; i < kLines; ++i) values[e][i] = chunk.at[i];
        } else {
#pragma unroll
          for (int i = 0; i < kLines; ++i) values[e][i] = kWide || k + e < s.depth ? at_k[line(i)] : T(0);
        }
      }
    }
  }
  __device__ void read_a(T (&values)[kStep][kRows], const T* a, int k) const {
    read<order_a, kWideRows>(values, a, k, order_a == Order::along_k ? s.depth : s.rows, [&](int i) { return min(row + i, s.rows - 1); });
  }
  __device__ void read_b(T (&values)[kStep][kCols], const T* b, int k) const {
    read<order_b, kWideCols>(values, b, k, order_b == Order::along_k ? s.depth : s.cols,
                             [&](int j) { return kWideCols ? col + j : min(col + j * stride, s.cols - 1); });
  }

  __device__ void add(T (&sum)[kSets][kRows][kCols], const ResidentProduct<T>& p, int part) const {
    const int steps = (s.depth + kStep - 1) / kStep;
    // Neighbouring threads read lines of b that are `steps` chunks apart. If `steps` is even their banks conflict, so they start apart.
    const int shift = order_b == Order::along_k && steps % 2 == 0 ? col % steps : 0;
    const auto k_of = [&](int step) { return (step + shift < steps ? step + shift : step + shift - steps) * kStep; };
    if constexpr (dual) {
#pragma unroll(kRows == 1 ? 2 : 1)
      for (int step = part; step < steps; step += s.split) {
        const int k = k_of(step);
        T a[kStep][kRows], b[kStep][kCols], other_a[kStep][kRows], other_b[kStep][kCols];
        read_a(a, p.a[0], k);
        read_b(other_b, p.b[1], k);
        add_outer_products(sum[1], a, other_b);
        read_b(b, p.b[0], k);
        add_outer_products(sum[0], a, b);
        read_a(other_a, p.a[1], k);
        add_outer_products(sum[1], other_a, b);
      }
    } else {
      for (int term = 0; term < (p.a[1] ? 2 : 1); ++term) {
        const T *const from_a = term ? p.a[1] : p.a[0], *const from_b = term ? p.b[1] : p.b[0];
#pragma unroll(kStep == 1 ? 4 : kRows == 1 ? 2 : 1)
        for (int step = part; step < steps; step += s.split) {
          const int k = k_of(step);
          T a[kStep][kRows], b[kStep][kCols];
          read_a(a, from_a, k);
          read_b(b, from_b, k);
          add_outer_products(sum[0], a, b);
        }
      }
    }
  }

  __device__ void write(const T (&sum)[kRows][kCols], T* out, const T* bias) const {
    T biases[kCols];
#pragma unroll
    for (int j = 0; j < kCols; ++j) biases[j] = bias ? bias[min(col + j * stride, s.cols - 1)] : T(0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= s.rows) break;
      T* const line = out + (row + i) * s.cols + col;
      Chunk<T> chunk;
#pragma unroll
      for (int j = 0; j < kCols; ++j) chunk.at[j] = sum[i][j] + biases[j];
      if constexpr (kWideCols) {
        *reinterpret_cast<Chunk<T>*>(line) = chunk;
      } else {
#pragma unroll
        for (int j = 0; j < kCols; ++j)
          if (col + j * stride < s.cols) line[j * stride] = chunk.at[j];
      }
    }
  }
};

// `rank` is the thread's number in the block, or that number minus a few whole warps.
template <class T, Order order_a, Order order_b, bool dual, int kRows, bool kWide>
__device__ __forceinline__ void multiply_tiles(const ResidentProduct<T>& p, const ResidentTiles& s, int rank) {
  using Tile = TileOfThread<T, order_a, order_b, dual, kRows, kWide>;
  const int col_tiles = (s.cols + Tile::kCols - 1) / Tile::kCols, tiles = (s.rows + kRows - 1) / kRows * col_tiles;
  for (int place = rank; place / 32 * 32 < tiles * s.split; place += blockDim.x) {  // whole warps, because shuffles need them
    const Tile tile(s, min(place / s.split, tiles - 1), col_tiles);
    T sum[Tile::kSets][kRows][Tile::kCols] = {};
    tile.add(sum, p, place % s.split);
#pragma unroll
    for (int set = 0; set < Tile::kSets; ++set)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kCols; ++j)
          for (int with = s.split / 2; with > 0; with /= 2) sum[set][i][j] += __shfl_xor_sync(0xffffffffu, sum[set][i][j], with);
    if (place % s.split > 0 || place / s.split >= tiles) continue;
#pragma unroll
    for (int set = 0; set < Tile::kSets; ++set) tile.write(sum[set], p.out[set], p.bias[set]);
  }
}

template <class T, Order order_a, Order order_b, bool dual>
__device__ __forceinline__ void multiply(const ResidentProduct<T>& p, const ResidentTiles& s, bool aligned, int rank) {
  constexpr int n = kChunk<T>;
  const bool k_fits = (order_a == Order::along_rows && order_b == Order::along_rows) || s.depth % n == 0;
  const bool cols_fit = order_b == Order::along_k || s.cols % n == 0;
  const bool rows_fit = order_a == Order::along_k || !s.tall || s.rows % n == 0;
  const bool wide = aligned && k_fits && cols_fit && rows_fit;
  constexpr int kTall = kTallRows<T, dual>;
  if (kTall > 1 && s.tall && wide)
    multiply_tiles<T, order_a, order_b, dual, kTall, true>(p, s, rank);
  else if (kTall > 1 && s.tall)
    multiply_tiles<T, order_a, order_b, dual, kTall, false>(p, s, rank);
  else if (wide)
    multiply_tiles<T, order_a, order_b, dual, 1, true>(p, s, rank);
  else
    multiply_tiles<T, order_a, order_b, dual, 1, false>(p, s, rank);
  if (!p.sums) return;
  for (int col = blockDim.x - 1 - rank; col < s.cols; col += blockDim.x) {  // from the end, where threads may have no tile
    T sum = T(0);
#pragma unroll 4
    for (int k = 0; k < s.depth; ++k) sum += p.b[0][k * s.cols + col];
    p.sums[col] = sum;
  }
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
