// Rows times matrices that are copied, slice by slice, into the order in which the tiles of row_product.h read them: panels of
// kTileVecs vectors, the numbers of a row of a panel side by side and the rows after each other. In their own order a panel's rows lie so
// far apart that they fall into a few sets of the cache, and each has a page to itself.
#pragma once

#include "cpu/kernels/row_product.h"

FASTMAML_CPU_BEGIN

template <class T>
struct PanelMatrix {
  const T* b;  // [depth, cols], or where it is read transposed [cols, depth]; null where no sum asks for it
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
inline constexpr int64_t kNearBytes = 2 * 1024 * 1024;  // a matrix no larger may come from a cache, if only the last

template <class T>
inline int64_t panel_room() {
  return kBlockK * kSlicePanels * kTileVecs * kLanes<T>;
}

// Columns of a plain matrix that are copied at a time, as deep as there is room for. For few rows all there is to wait for is the matrix,
// which arrives fastest in long runs; for many, few columns are copied of each of its rows, so that a sum goes through memory once for
// kBlockK products.
template <class T>
inline int64_t slice_width(int64_t rows, int64_t whole) {
  constexpr int64_t kFewRows = 16, kRun = 4096 / sizeof(T);
  if (rows > kFewRows) return kSlicePanels * kTileVecs * kLanes<T>;
  return whole < kRun ? whole : kRun;
}

// to [panel][depth][a panel's width] = rows `first` .. `first + depth` of columns `left` .. `left + width` (whole vectors) of b [.., cols]
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

// the same of b's transpose, b [cols, length]
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

// Up to two sums of up to two matrices at once, that share what is copied. a_at, out_at: [rows], where rows of every a and of every out
// start.
template <class T, bool kTransposed>
inline void panel_product(const PanelSum<T>* sums, int count, const PanelMatrix<T> (&matrices)[2], int64_t rows, int64_t cols,
                          int64_t depth, const int32_t* a_at, const int32_t* out_at) {
  constexpr int64_t L = kLanes<T>, kPanel = kTileVecs * L;
  const int64_t whole = padded_cols<T>(cols);
  // where a copy would look the same, or would be read once and not even spare waiting for memory
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
