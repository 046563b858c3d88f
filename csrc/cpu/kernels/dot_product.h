// out [rows, cols] = bias + sum over terms of a [rows, depth] times the transpose of w [cols, depth], as dot products.
// w is not copied, and is read once for every few rows, from end to end. A sum runs in vector lanes, which are added up at its end.
#pragma once

#include "cpu/kernels/transpose.h"

FASTMAML_CPU_BEGIN

#ifdef __AVX512F__
inline constexpr int kDotRows = 6, kDotCols = 4;
#else
inline constexpr int kDotRows = 3, kDotCols = 3;
#endif

template <class T>
struct DotTerm {
  const T *a, *w;
};

// Adding up lanes costs as much as 8 numbers of depth for each row. panel_product instead copies w once for all rows.
inline bool dots_pay(int64_t rows, int64_t depth) { return 12 * rows < depth; }

template <class V, class T>
inline V load_some(const T* p, int64_t count) {
  V v{};
  std::memcpy(&v, p, size_t(count) * sizeof(T));
  return v;
}

// lane i = the sum of vector i's lanes
template <int kHalf, class V, size_t n>
inline __attribute__((always_inline)) V lane_sums(std::array<V, n>& rows) {
  if constexpr (kHalf > 0) {
    for (size_t r = 0; r < kHalf; ++r) {
      swap_blocks<kHalf>(rows[r], rows[r + kHalf], std::make_index_sequence<n>());
      rows[r] += rows[r + kHalf];
    }
    return lane_sums<kHalf / 2>(rows);
  } else {
    return rows[0];
  }
}

// sums[r * lanes + c], vectors: row n + r of a times column o + c
template <class T, int kRows, int kCols>
inline __attribute__((always_inline)) void dot_tile(Vec<T>* sums, const DotTerm<T>* terms, int n_terms, int64_t n, int64_t o,
                                                    int64_t depth) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  V acc[kRows][kCols];
  for (auto& row : acc)
    for (V& v : row) v = V{};
  for (int t = 0; t < n_terms; ++t) {
    const T *a = terms[t].a + n * depth, *w = terms[t].w + o * depth;
    const auto add = [&](auto&& read) {
      V b[kCols];
      for (int c = 0; c < kCols; ++c) b[c] = read(w + c * depth);
      for (int r = 0; r < kRows; ++r) {
        const V x = read(a + r * depth);
        for (int c = 0; c < kCols; ++c) acc[r][c] += x * b[c];
      }
    };
    int64_t k = 0;
    for (; k + L <= depth; k += L) add([k](const T* p) { return load<V>(p + k); });
    if (k < depth) add([k, depth](const T* p) { return load_some<V>(p + k, depth - k); });
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kCols; ++c) sums[r * L + c] = acc[r][c];
}

// a block of columns as wide as a vector, starting at `o`
template <class T, int kRows>
inline void dot_rows(T* out, const T* bias, const DotTerm<T>* terms, int n_terms, int64_t n, int64_t o, int64_t cols, int64_t depth) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  const int64_t valid = cols - o < L ? cols - o : L;
  V sums[kRows * L];
  int64_t c = 0;
  for (; c + kDotCols <= valid; c += kDotCols) dot_tile<T, kRows, kDotCols>(sums + c, terms, n_terms, n, o + c, depth);
  for (; c < valid; ++c) dot_tile<T, kRows, 1>(sums + c, terms, n_terms, n, o + c, depth);
  for (; c < L; ++c)
    for (int r = 0; r < kRows; ++r) sums[r * L + c] = V{};
  for (int r = 0; r < kRows; ++r) {
    std::array<V, L> row;
    for (int64_t i = 0; i < L; ++i) row[i] = sums[r * L + i];
    V y = lane_sums<L / 2>(row);
    T* to = out + (n + r) * cols + o;
    if (valid == L) {
      if (bias) y += load<V>(bias + o);
      store(to, y);
    } else {
      for (int64_t i = 0; i < valid; ++i) to[i] = y[i] + (bias ? bias[o + i] : T(0));
    }
  }
}

// Calls f(count) with the number of rows, at most kMost, that no whole tile covers.
template <int kMost, class F>
inline void rest_of_dots(int64_t count, F f) {
  if constexpr (kMost > 0) {
    if (count == kMost)
      f(std::integral_constant<int, kMost>());
    else
      rest_of_dots<kMost - 1>(count, f);
  }
}

template <class T>
inline void dot_product(T* out, const T* bias, const DotTerm<T>* terms, int n_terms, int64_t rows, int64_t cols, int64_t depth) {
  for (int64_t o = 0; o < cols; o += kLanes<T>) {
    const auto some = [&](auto count, int64_t n) { dot_rows<T, count>(out, bias, terms, n_terms, n, o, cols, depth); };
    int64_t n = 0;
    for (; n + kDotRows <= rows; n += kDotRows) some(std::integral_constant<int, kDotRows>(), n);
    rest_of_dots<kDotRows - 1>(rows - n, [&](auto count) { some(count, n); });
  }
}

FASTMAML_CPU_END
