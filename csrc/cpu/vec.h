// Vectors of any width. Every file of cpu/ is compiled once for each instruction set, with FASTMAML_ISA (a namespace) and
// FASTMAML_LANES_BYTES (16, 32 or 64). Code uses a type V: a vector, or one number for the tail.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef FASTMAML_ISA
#error "compile with -DFASTMAML_ISA=name -DFASTMAML_LANES_BYTES=bytes"
#endif

#define FASTMAML_CPU_BEGIN \
  namespace fastmaml {     \
  namespace cpu {          \
  namespace FASTMAML_ISA {
#define FASTMAML_CPU_END \
  }                      \
  }                      \
  }

FASTMAML_CPU_BEGIN

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(FASTMAML_LANES_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
inline constexpr int64_t kLanes = FASTMAML_LANES_BYTES / sizeof(T);

template <class V, class T>
inline __attribute__((always_inline)) V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
inline __attribute__((always_inline)) void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <class V, class T>
inline __attribute__((always_inline)) V broadcast(T x) {
  if constexpr (std::is_same_v<V, T>)
    return x;
  else
    return x - V{};  // GCC splats the scalar
}
// One operand that may be absent.
template <class V, class T>
inline __attribute__((always_inline)) V load_or(const T* p, int64_t i, T otherwise) {
  return p ? load<V>(p + i) : broadcast<V>(otherwise);
}

template <class M, class V>
inline __attribute__((always_inline)) V where(M mask, V yes, V no) {
  return mask ? yes : no;
}

template <class T, class V>
inline T sum_lanes(V v) {
  if constexpr (std::is_same_v<V, T>) {
    return v;
  } else {
    T s = 0;
    for (int64_t i = 0; i < kLanes<T>; ++i) s += v[i];
    return s;
  }
}

// Calls f(V{}, i) for i = 0, lanes, 2 lanes, ..., then for single numbers.
template <class T, class F>
inline __attribute__((always_inline)) void for_lanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) f(Vec<T>{}, i);
  for (; i < n; ++i) f(T{}, i);
}

// The sum of f(V{}, i) over i = 0 .. n - 1: in T within blocks of 64 numbers, in double over blocks.
template <class T, class F>
inline double block_sum(int64_t n, F f) {
  constexpr int64_t kBlock = 64;
  double total = 0;
  for (int64_t from = 0; from < n; from += kBlock) {
    const int64_t count = n - from < kBlock ? n - from : kBlock;
    Vec<T> acc{};
    T tail = 0;
    for_lanes<T>(count, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      if constexpr (std::is_same_v<V, T>)
        tail += f(lane, from + i);
      else
        acc += f(lane, from + i);
    });
    total += double(sum_lanes<T>(acc)) + double(tail);
  }
  return total;
}

// Sums down columns go through tiles that fit L1: in T within a tile, in double over tiles.
// The error then does not grow with the number of rows.
inline constexpr int64_t kSumRows = 32;
inline constexpr int64_t kSumColumns = 128;

// sums[q][c - first] = sum over a tile's rows of f's q-th value at (row, c), for Q sums at once. f(V{}, row, c, V out[Q]).
// Four rows at a time go through all columns, which is nearly the order of memory.
template <class T, int Q, class F>
inline __attribute__((always_inline)) void tile_sums(int64_t from, int64_t to, int64_t first, int64_t columns, T (&sums)[Q][kSumColumns],
                                                     F f) {
  for (auto& sum : sums) std::memset(sum, 0, size_t(columns) * sizeof(T));
  for (int64_t r = from; r < to; r += 4)
    for_lanes<T>(columns, [&](auto lane, int64_t c) {
      using V = decltype(lane);
      V acc[Q], more[Q];
      for (int q = 0; q < Q; ++q) acc[q] = load<V>(sums[q] + c);
      const auto add = [&](int64_t row) {
        f(lane, row, first + c, more);
        for (int q = 0; q < Q; ++q) acc[q] += more[q];
      };
      if (r + 4 <= to) {
        add(r);
        add(r + 1);
        add(r + 2);
        add(r + 3);
      } else {
        for (int64_t row = r; row < to; ++row) add(row);
      }
      for (int q = 0; q < Q; ++q) store(sums[q] + c, acc[q]);
    });
}

// Calls f(from, to, first, columns) for every tile.
template <class F>
inline __attribute__((always_inline)) void for_tiles(int64_t rows, int64_t C, F f) {
  for (int64_t from = 0; from < rows; from += kSumRows)
    for (int64_t first = 0; first < C; first += kSumColumns)
      f(from, from + kSumRows < rows ? from + kSumRows : rows, first, C - first < kSumColumns ? C - first : kSumColumns);
}

// sums[q * C + c] = sum over all rows of f's q-th value at (row, c)
template <class T, int Q, class F>
inline void column_sums(int64_t rows, int64_t C, double* sums, F f) {
  for (int64_t i = 0; i < Q * C; ++i) sums[i] = 0;
  T part[Q][kSumColumns];
  for_tiles(rows, C, [&](int64_t from, int64_t to, int64_t first, int64_t columns) {
    tile_sums<T, Q>(from, to, first, columns, part, f);
    for (int q = 0; q < Q; ++q)
      for (int64_t c = 0; c < columns; ++c) sums[q * C + first + c] += double(part[q][c]);
  });
}

FASTMAML_CPU_END
