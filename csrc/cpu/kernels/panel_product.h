// Rows times matrices. The matrices are copied, slice by slice, into the order in which the tiles of row_product.h read them.
// A panel is kTileVecs vectors wide; its rows follow each other in memory.
// Without the copy, a panel's rows lie far apart: they share a few sets of the cache, and each row needs its own page.
#pragma once

#include "cpu/kernels/row_product.h"

FASTMAML_CPU_BEGIN

template <class T>
struct PanelMatrix {
  const T* b;  // [depth, cols], or [cols, depth] if read transposed; null if no sum uses it
  T* packed;   // room for panel_room<T>() numbers
};

template <class T>
struct PanelSum {  // out [rows, cols] = bias + sum over terms of a [rows, depth] times a matrix
  T* out;
  const T* bias;  // [cols] or null
  int terms;      // at most 2
  const T* a[2];
  int matrix[2];
};

inline constexpr int64_t kSlicePanels = 4;
inline constexpr int64_t kNearBytes = 2 * 1024 * 1024;  // up to this size a matrix may come from the last-level cache

template <class T>
inline int64_t panel_room() {
  return kBlockK * kSlicePanels * kTileVecs * kLanes<T>;
}

// Columns of a plain matrix to copy at a time, as deep as there is room for.
// With few rows, reading the matrix is the bottleneck, and long runs are fastest.
// With many rows, few columns are copied, so that a sum goes through memory once for kBlockK products.
template <class T>
inline int64_t slice_width(int64_t rows, int64_t whole) {
  constexpr int64_t kFewRows = 16, kRun = 4096 / sizeof(T);
  if (rows > kFewRows) return kSlicePanels * kTileVecs * kLanes<T>;
  return whole < kRun ? whole : kRun;
}

// to [panel][depth][panel width] = rows first .. first + depth - 1, columns left .. left + width - 1 (whole vectors) of b [.., cols]
template <class T>
inline void pack_slice(T* to, const T* b, int64_t cols, int64_t first, int64_t depth, int64_t left, int64_t width) {
  constexpr int64_t kPanel = kTileVecs * kLanes<T>;
  for (int64_t k = 0; k < depth; ++k) {
    const T* row = b + (first + k) * cols;
    for (int64_t j = 0; j < width; j += kPanel) {
      const int64_t ld = width - j < kPanel ? width - j : kPanel, valid = cols - left - j < ld ? cols - left - j : ld;
      T* out = to + j * depth + k * ld;
      if (valid == kPanel) {
        std::memcpy(out, row + left + j, size_t(kPanel) * sizeof(T));
      } else {
        for (int64_t c = 0; c < ld; ++c) out[c] = c < valid ? row[left + j + c] : T(0);
      }
    }
  }
}

// pack_slice of b's transpose, b [cols, length]
template <class T>
inline void pack_transposed(T* to, const T* b, int64_t cols, int64_t length, int64_t first, int64_t depth, int64_t left, int64_t width) {
  constexpr int64_t L = kLanes<T>, kPanel = kTileVecs * L;
  for (int64_t j = 0; j < width; j += L) {
    const int64_t panel = j / kPanel * kPanel, ld = width - panel < kPanel ? width - panel : kPanel, rows = cols - left - j;
    T* out = to + panel * depth + (j - panel);
    const T* from = b + (left + j) * length + first;
    int64_t k = 0;
    if (rows >= L)
      for (; k + L <= depth; k += L) {
        std::array<Vec<T>, L> square;
        for (int64_t i = 0; i < L; ++i) square[i] = load<Vec<T>>(from + i * length + k);
        transpose_blocks<L / 2>(square);
        for (int64_t i = 0; i < L; ++i) store(out + (k + i) * ld, square[i]);
      }
    for (; k < depth; ++k)
      for (int64_t i = 0; i < L; ++i) out[k * ld + i] = i < rows ? from[i * length + k] : T(0);
  }
}

// Up to two sums over up to two matrices at once, which share the copies.
// a_at, out_at: [rows], the start of each row in every a and every out.
template <class T, bool kTransposed>
inline void panel_product(const PanelSum<T>* sums, int count, const PanelMatrix<T> (&matrices)[2], int64_t rows, int64_t cols,
                          int64_t depth, const int32_t* a_at, const int32_t* out_at) {
  constexpr int64_t L = kLanes<T>, kPanel = kTileVecs * L;
  const int64_t whole = padded_cols<T>(cols);
  // no copy if it would look the same, or if it is read only once and would not save waiting for memory
  const bool near = depth * cols * int64_t(sizeof(T)) <= kNearBytes;
  const bool in_place = !kTransposed && cols == whole && (cols <= kPanel || (rows <= kTallRows && near));
  const int64_t most = kTransposed ? kPanel : in_place ? kSlicePanels * kPanel : slice_width<T>(rows, whole);
  for (int64_t from = 0; from < rows; from += kBlockRows) {
    const int64_t to = from + kBlockRows < rows ? from + kBlockRows : rows;
    for (int64_t left = 0; left < whole; left += most) {
      const int64_t width = whole - left < most ? whole - left : most, room = panel_room<T>() / width;
      const int64_t deep = room < kBlockK ? room : kBlockK;
      for (int64_t first = 0; first < depth; first += deep) {
        const int64_t k = depth - first < deep ? depth - first : deep;
        for (const PanelMatrix<T>& m : matrices)
          if (!m.b || in_place)
            continue;
          else if (kTransposed)
            pack_transposed(m.packed, m.b, cols, depth, first, k, left, width);
          else
            pack_slice(m.packed, m.b, cols, first, k, left, width);
        for (int64_t j = 0; j < width; j += kPanel)
          for (int s = 0; s < count; ++s) {
            const PanelSum<T>& sum = sums[s];
            const int64_t at = left + j, ld = width - j < kPanel ? width - j : kPanel;
            Term<T> terms[2];
            for (int t = 0; t < sum.terms; ++t) {
              const PanelMatrix<T>& m = matrices[sum.matrix[t]];
              terms[t] = {sum.a[t] - sum.a[0] + first, in_place ? m.b + first * cols + at : m.packed + j * k, k};
            }
            const RowProduct<T> p{
                sum.out + at, out_at, sum.a[0], a_at, rows, cols - at, in_place ? cols : ld, sum.bias ? sum.bias + at : nullptr};
            if (ld == kPanel)
              row_panel<T, kTileVecs>(p, terms, sum.terms, from, to, 0, first == 0);
            else
              row_panel<T, 1>(p, terms, sum.terms, from, to, 0, first == 0);
          }
      }
    }
  }
}

FASTMAML_CPU_END
