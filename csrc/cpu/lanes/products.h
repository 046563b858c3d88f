// The two products of linear layers, where every number is a vector of kLanes tasks:
//   lane_product    out[n, j] = bias[j] + sum over terms and k of a[n, k] b[k, j]
//   lane_outer      out[i, o] = sum over terms and n of a[n, i] b[n, o]
// A tile has kLaneRows by kLaneCols accumulators, as many as registers hold together with one row of b.
// Each number of the result has one accumulator, so its bits do not depend on the tiles.
#pragma once

#include "cpu/lanes/lanes.h"

FASTMAML_CPU_BEGIN

#if defined(__AVX512F__)  // 32 registers
inline constexpr int kLaneRows = 5, kLaneCols = 5;
#elif FASTMAML_LANES_BYTES == 32  // 16
inline constexpr int kLaneRows = 4, kLaneCols = 3;
#else                             // 16 without fused multiply-add, or half as many
inline constexpr int kLaneRows = 3, kLaneCols = 3;
#endif
inline constexpr int64_t kLaneBlockBytes = FASTMAML_LANES_BYTES * 576;  // rows of a that share a pass over b; they stay in L1
inline constexpr int64_t kLaneBlockRows = 32;                           // lane_outer adds up sums of this many rows

// Splits n into as few parts of at most `most` as possible, with sizes that differ by at most one. Calls body(kSize constant, first).
template <int kMost, class Body>
inline __attribute__((always_inline)) void with_size(int64_t size, int64_t first, const Body& body) {
  if constexpr (kMost > 0) {
    if (size == kMost)
      body(std::integral_constant<int, kMost>{}, first);
    else
      with_size<kMost - 1>(size, first, body);
  }
}
template <int kMost, class Body>
inline __attribute__((always_inline)) void in_parts(int64_t from, int64_t to, const Body& body) {
  for (int64_t left = (to - from + kMost - 1) / kMost; left > 0; --left) {
    const int64_t size = (to - from + left - 1) / left;
    with_size<kMost>(size, from, body);
    from += size;
  }
}

// body(row, col), unrolled: accumulators must not be arrays in memory.
template <int kRows, int kCols, class Body>
inline __attribute__((always_inline)) void each_of_tile(const Body& body) {
#pragma GCC unroll 8
  for (int n = 0; n < kRows; ++n)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) body(n, j);
}

template <class T>
struct LaneTerm {
  const T* a;
  const T* b;
};

template <class T>
struct LaneProduct {
  T* out;  // [rows, cols]
  int64_t rows, cols, depth;
  bool transposed;  // b is [cols, depth]
  const T* bias;    // [cols] or null
  LaneRectifier<T> rectify;
  const T* sign;  // [rows, cols], rectifies out by this sign; null: by out's own sign, if rectify is on
  LaneTerm<T> terms[2];
  int n_terms;
};

// Adds term t to a tile.
template <class T, bool kTransposed, int kRows, int kCols>
inline __attribute__((always_inline)) void lane_product_tile(const LaneProduct<T>& p, int t, int64_t n0, int64_t j0) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  T* const out = p.out + (n0 * p.cols + j0) * L;
  V acc[kRows][kCols];
  if (t > 0) {
    each_of_tile<kRows, kCols>([&](int n, int j) { acc[n][j] = load<V>(out + (n * p.cols + j) * L); });
  } else if (p.bias) {
    each_of_tile<kRows, kCols>([&](int n, int j) { acc[n][j] = load<V>(p.bias + (j0 + j) * L); });
  } else {
    each_of_tile<kRows, kCols>([&](int n, int j) { acc[n][j] = V{}; });
  }
  const int64_t across = kTransposed ? p.depth * L : L, along = kTransposed ? L : p.cols * L;
  const T *a = p.terms[t].a + n0 * p.depth * L, *b = p.terms[t].b + j0 * across;
  for (int64_t k = 0; k < p.depth; ++k, a += L, b += along) {
    V row[kCols];
    for (int j = 0; j < kCols; ++j) row[j] = load<V>(b + j * across);
    each_of_tile<kRows, kCols>([&](int n, int j) { acc[n][j] += load<V>(a + n * p.depth * L) * row[j]; });
  }
  if (p.rectify.on && t == p.n_terms - 1) {
    const T* const sign = p.sign ? p.sign + (n0 * p.cols + j0) * L : nullptr;
    each_of_tile<kRows, kCols>(
        [&](int n, int j) { acc[n][j] = p.rectify(sign ? load<V>(sign + (n * p.cols + j) * L) : acc[n][j], acc[n][j]); });
  }
  each_of_tile<kRows, kCols>([&](int n, int j) { store(out + (n * p.cols + j) * L, acc[n][j]); });
}

template <class T, bool kTransposed>
inline void lane_product_blocks(const LaneProduct<T>& p) {
  const int64_t bytes = p.rows * p.depth * kLanes<T> * int64_t(sizeof(T)), blocks = (bytes + kLaneBlockBytes - 1) / kLaneBlockBytes;
  for (int t = 0; t < p.n_terms; ++t)
    for (int64_t left = blocks, from = 0; from < p.rows; --left) {
      const int64_t even = left > 1 ? (p.rows - from + left - 1) / left : p.rows - from, to = from + even;
      in_parts<kLaneCols>(0, p.cols, [&](auto cols, int64_t j0) {
        in_parts<kLaneRows>(from, to, [&](auto rows, int64_t n0) { lane_product_tile<T, kTransposed, rows, cols>(p, t, n0, j0); });
      });
      from = to;
    }
}

template <class T>
inline void lane_product(const LaneProduct<T>& p) {
  if (p.transposed)
    lane_product_blocks<T, true>(p);
  else
    lane_product_blocks<T, false>(p);
}

template <class T>
struct LaneOuter {
  T* out;  // [in, cols]
  int64_t rows, in, cols;
  LaneTerm<T> terms[2];
  int n_terms;
};

template <class T, int kRows, int kCols>
inline __attribute__((always_inline)) void lane_outer_tile(const LaneOuter<T>& p, int64_t from, int64_t to, int64_t i0, int64_t o0) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  V acc[kRows][kCols];
  T* const out = p.out + (i0 * p.cols + o0) * L;
  each_of_tile<kRows, kCols>([&](int i, int o) { acc[i][o] = V{}; });
  for (int t = 0; t < p.n_terms; ++t) {
    const T *a = p.terms[t].a + (from * p.in + i0) * L, *b = p.terms[t].b + (from * p.cols + o0) * L;
    for (int64_t n = from; n < to; ++n, a += p.in * L, b += p.cols * L) {
      V row[kCols];
      for (int o = 0; o < kCols; ++o) row[o] = load<V>(b + o * L);
      each_of_tile<kRows, kCols>([&](int i, int o) { acc[i][o] += load<V>(a + i * L) * row[o]; });
    }
  }
  if (from > 0) each_of_tile<kRows, kCols>([&](int i, int o) { acc[i][o] += load<V>(out + (i * p.cols + o) * L); });
  each_of_tile<kRows, kCols>([&](int i, int o) { store(out + (i * p.cols + o) * L, acc[i][o]); });
}

template <class T>
inline void lane_outer(const LaneOuter<T>& p) {
  for (int64_t from = 0; from < p.rows; from += kLaneBlockRows) {
    const int64_t to = from + kLaneBlockRows < p.rows ? from + kLaneBlockRows : p.rows;
    in_parts<kLaneRows>(0, p.in, [&](auto rows, int64_t i0) {
      in_parts<kLaneCols>(0, p.cols, [&](auto cols, int64_t o0) { lane_outer_tile<T, rows, cols>(p, from, to, i0, o0); });
    });
  }
}

FASTMAML_CPU_END
