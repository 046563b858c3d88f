// Squares of kLanes vectors, transposed in registers.
#pragma once

#include <array>
#include <utility>

#include "cpu/vec.h"

FASTMAML_CPU_BEGIN

// Two rows of a matrix, h apart: exchanges their blocks of h numbers across the diagonal.
template <int kHalf, class V, size_t... kI>
inline __attribute__((always_inline)) void swap_blocks(V& a, V& b, std::index_sequence<kI...>) {
  constexpr size_t n = sizeof...(kI);
  const V upper = __builtin_shufflevector(a, b, int(kI & kHalf ? n + kI - kHalf : kI)...);
  const V lower = __builtin_shufflevector(a, b, int(kI & kHalf ? n + kI : kI + kHalf)...);
  a = upper;
  b = lower;
}

template <int kHalf, class V, size_t n>
inline __attribute__((always_inline)) void transpose_blocks(std::array<V, n>& rows) {
  if constexpr (kHalf > 0) {
    for (size_t r = 0; r < n; ++r)
      if (!(r & kHalf)) swap_blocks<kHalf>(rows[r], rows[r + kHalf], std::make_index_sequence<n>());
    transpose_blocks<kHalf / 2>(rows);
  }
}

// to [cols, ld] = from [rows, cols] transposed, ld = rows in whole vectors, the rest zero.
template <class T>
inline void transpose(T* to, const T* from, int64_t rows, int64_t cols, int64_t ld) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t r0 = 0; r0 < ld; r0 += L)
    for (int64_t c0 = 0; c0 < cols; c0 += L) {
      if (r0 + L <= rows && c0 + L <= cols) {
        std::array<Vec<T>, L> square;
        for (int64_t i = 0; i < L; ++i) square[i] = load<Vec<T>>(from + (r0 + i) * cols + c0);
        transpose_blocks<L / 2>(square);
        for (int64_t i = 0; i < L; ++i) store(to + (c0 + i) * ld + r0, square[i]);
        continue;
      }
      for (int64_t c = c0; c < cols && c < c0 + L; ++c)
        for (int64_t r = r0; r < r0 + L; ++r) to[c * ld + r] = r < rows ? from[r * cols + c] : T(0);
    }
}

FASTMAML_CPU_END
