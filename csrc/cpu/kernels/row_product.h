// The two register-blocked products of linear and conv2d.
//   row_product    out[i, :] (+)= bias + sum over terms of a_i[term] (one row) times b[term]        rows come from anywhere
//   outer_product  out (+)= sum over pixels of a_p (a column of `m` numbers) times b_p (a row)      the weight gradient
// A tile is 6 rows by 2 vectors: 12 accumulators, 2 vectors of b and one broadcast fit the 16 registers of AVX2.
// With 32 registers, tiles of 12 and 8 rows use each load of b, and each end of a tile, for more products.
// Panels must not be inlined: GCC 12 then has fewer registers for a tile. conv2d's weight gradient took 1.8 times as long.
#pragma once

#include "cpu/kernels/transpose.h"
#include "cpu/vec.h"

FASTMAML_CPU_BEGIN

inline constexpr int kTileRows = 6;
inline constexpr int kTileVecs = 2;
#ifdef __AVX512F__
inline constexpr int kTallRows = 12, kMiddleRows = 8, kOuterRows = 8;
#else
inline constexpr int kTallRows = kTileRows, kMiddleRows = kTileRows, kOuterRows = kTileRows;
#endif
inline constexpr int64_t kBlockRows = 384;    // rows that share one pass over b; their a stays in L2
inline constexpr int64_t kBlockK = 256;       // depth of one pass; its slice of b (16 KB) stays in L1
inline constexpr int64_t kBlockPixels = 128;  // outer_product: a and b of one block stay in L1 and L2

template <class T>
struct Term {
  int64_t a;   // offset from a row's start
  const T* b;  // [k, cols rounded up to whole vectors]
  int64_t k;
};

template <class T>
struct RowProduct {
  T* out;
  const int32_t* out_at;  // row i of out starts at out + out_at[i], or out + i * cols where null
  const T* a;
  const int32_t* a_at;  // row i of a starts at a + a_at[i]
  int64_t rows, cols;
  int64_t ldb;    // row length of every b: cols rounded up to whole vectors
  const T* bias;  // [cols] or null
};

template <class T>
inline int64_t padded_cols(int64_t cols) {
  return (cols + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T, int MR, int NV>
inline __attribute__((always_inline)) void row_tile(const RowProduct<T>& p, const Term<T>* terms, int n_terms, int64_t i0, int64_t j0,
                                                    bool first) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  V acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = V{};
  const T* rows[MR];
  for (int i = 0; i < MR; ++i) rows[i] = p.a + p.a_at[i0 + i];
  for (int t = 0; t < n_terms; ++t) {
    const T* b = terms[t].b + j0;
    const int64_t depth = terms[t].k, shift = terms[t].a;
    for (int64_t k = 0; k < depth; ++k, b += p.ldb) {
      V bv[NV];
      for (int v = 0; v < NV; ++v) bv[v] = load<V>(b + v * L);
      for (int i = 0; i < MR; ++i) {
        const V s = broadcast<V>(rows[i][shift + k]);
        for (int v = 0; v < NV; ++v) acc[i][v] += s * bv[v];
      }
    }
  }
  const int64_t valid = p.cols - j0;
  for (int i = 0; i < MR; ++i) {
    T* out = p.out + (p.out_at ? p.out_at[i0 + i] : (i0 + i) * p.cols) + j0;
    if (valid >= NV * L) {
      for (int v = 0; v < NV; ++v) {
        V sum = acc[i][v];
        if (!first)
          sum += load<V>(out + v * L);
        else if (p.bias)
          sum += load<V>(p.bias + j0 + v * L);
        store(out + v * L, sum);
      }
    } else {
      T row[NV * L];
      for (int v = 0; v < NV; ++v) store(row + v * L, acc[i][v]);
      for (int64_t j = 0; j < valid; ++j) out[j] = row[j] + (first ? (p.bias ? p.bias[j0 + j] : T(0)) : out[j]);
    }
  }
}

template <class T, int NV>
__attribute__((noinline)) void row_panel(const RowProduct<T>& p, const Term<T>* terms, int n_terms, int64_t from, int64_t to, int64_t j0,
                                         bool first) {
  int64_t i = from;
  for (; i + kTallRows <= to; i += kTallRows) row_tile<T, kTallRows, NV>(p, terms, n_terms, i, j0, first);
  if constexpr (kMiddleRows < kTallRows)
    for (; i + kMiddleRows <= to; i += kMiddleRows) row_tile<T, kMiddleRows, NV>(p, terms, n_terms, i, j0, first);
  for (; i + kTileRows <= to; i += kTileRows) row_tile<T, kTileRows, NV>(p, terms, n_terms, i, j0, first);
  switch (to - i) {
    case 5:
      row_tile<T, 5, NV>(p, terms, n_terms, i, j0, first);
      break;
    case 4:
      row_tile<T, 4, NV>(p, terms, n_terms, i, j0, first);
      break;
    case 3:
      row_tile<T, 3, NV>(p, terms, n_terms, i, j0, first);
      break;
    case 2:
      row_tile<T, 2, NV>(p, terms, n_terms, i, j0, first);
      break;
    case 1:
      row_tile<T, 1, NV>(p, terms, n_terms, i, j0, first);
      break;
    default:
      break;
  }
}

// Each of the `terms` may be at most kBlockK deep (split_term).
template <class T>
inline void row_product(const RowProduct<T>& p, const Term<T>* terms, int n_terms) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t from = 0; from < p.rows; from += kBlockRows) {
    const int64_t to = from + kBlockRows < p.rows ? from + kBlockRows : p.rows;
    int t = 0;
    do {  // runs once even without terms, when the rows are the bias or zero
      int end = t;
      int64_t depth = 0;
      while (end < n_terms && (end == t || depth + terms[end].k <= kBlockK)) depth += terms[end++].k;
      for (int64_t j = 0; j < p.ldb; j += kTileVecs * L) {
        if (j + kTileVecs * L <= p.ldb)
          row_panel<T, kTileVecs>(p, terms + t, end - t, from, to, j, t == 0);
        else
          row_panel<T, 1>(p, terms + t, end - t, from, to, j, t == 0);
      }
      t = end;
    } while (t < n_terms);
  }
}

template <class T>
inline int term_count(int64_t k) {
  return int((k + kBlockK - 1) / kBlockK);
}
// Appends a[shift .. shift + k) times b in slices of kBlockK. Returns the number of slices.
template <class T>
inline int split_term(Term<T>* terms, int64_t shift, const T* b, int64_t k, int64_t ldb) {
  int n = 0;
  for (int64_t from = 0; from < k; from += kBlockK) terms[n++] = {shift + from, b + from * ldb, k - from < kBlockK ? k - from : kBlockK};
  return n;
}

template <class T>
struct OuterTerm {
  const T* a;  // pixel p's column starts at a + a_at[p]
  const T* b;  // pixel p's row starts at b + p * ldb
};

// Where a sum goes. It is added to `out`, or starts `out` if it is the first.
// With a `base`, out = base - rate times the sum. The base is laid out as `out`, and may be `out`.
template <class T>
struct OuterEnd {
  bool first;
  const T* base = nullptr;
  T rate = T(0);
  OuterEnd at(int64_t offset) const { return {first, base ? base + offset : nullptr, rate}; }
};

template <class T, int MR, int NV>
inline __attribute__((always_inline)) void outer_tile(T* out, int64_t ldo, int64_t valid, const OuterTerm<T>* terms, int n_terms,
                                                      const int32_t* a_at, int64_t ldb, int64_t pixels, const OuterEnd<T>& end) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>, kLine = 64 / sizeof(T), kSoon = 16;  // so many pixels' products take as long as a cache line from L3
  const int64_t ahead = pixels < kSoon ? 4 * NV * L : 0;
  if (end.base)
    for (int i = 0; i < MR; ++i)
      for (int64_t c = 0; c < NV * L; c += kLine) {
        __builtin_prefetch(out + i * ldo + ahead + c, 1);
        __builtin_prefetch(end.base + i * ldo + ahead + c);
      }
  V acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = V{};
  for (int t = 0; t < n_terms; ++t) {
    const T* b = terms[t].b;
    for (int64_t p = 0; p < pixels; ++p, b += ldb) {
      const T* a = terms[t].a + a_at[p];
      V bv[NV];
      for (int v = 0; v < NV; ++v) bv[v] = load<V>(b + v * L);
      for (int i = 0; i < MR; ++i) {
        const V s = broadcast<V>(a[i]);
        for (int v = 0; v < NV; ++v) acc[i][v] += s * bv[v];
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    T* row = out + i * ldo;
    const T* base = end.base ? end.base + i * ldo : nullptr;
    if (valid >= NV * L) {
      for (int v = 0; v < NV; ++v)
        store(row + v * L, base ? load<V>(base + v * L) - end.rate * acc[i][v] : end.first ? acc[i][v] : acc[i][v] + load<V>(row + v * L));
    } else {
      T tile[NV * L];
      for (int v = 0; v < NV; ++v) store(tile + v * L, acc[i][v]);
      for (int64_t j = 0; j < valid; ++j) row[j] = base ? base[j] - end.rate * tile[j] : end.first ? tile[j] : row[j] + tile[j];
    }
  }
}

template <class T, int NV>
__attribute__((noinline)) void outer_panel(T* out, int64_t ldo, int64_t valid, int64_t m, const OuterTerm<T>* terms, int n_terms,
                                           const int32_t* a_at, int64_t ldb, int64_t pixels, const OuterEnd<T>& end) {
  constexpr int kMaxTerms = 2;
  OuterTerm<T> shifted[kMaxTerms];
  int64_t rows = kOuterRows;
  for (int64_t i = 0; i < m; i += rows) {
    for (int t = 0; t < n_terms; ++t) shifted[t] = {terms[t].a + i, terms[t].b};
    T* to = out + i * ldo;
    const OuterEnd<T> of = end.at(i * ldo);
    rows = m - i >= kOuterRows ? kOuterRows : m - i >= kTileRows ? kTileRows : m - i;
    switch (rows) {
      case kOuterRows:
        outer_tile<T, kOuterRows, NV>(to, ldo, valid, shifted, n_terms, a_at, ldb, pixels, of);
        break;
#ifdef __AVX512F__
      case kTileRows:
        outer_tile<T, kTileRows, NV>(to, ldo, valid, shifted, n_terms, a_at, ldb, pixels, of);
        break;
#endif
      case 5:
        outer_tile<T, 5, NV>(to, ldo, valid, shifted, n_terms, a_at, ldb, pixels, of);
        break;
      case 4:
        outer_tile<T, 4, NV>(to, ldo, valid, shifted, n_terms, a_at, ldb, pixels, of);
        break;
      case 3:
        outer_tile<T, 3, NV>(to, ldo, valid, shifted, n_terms, a_at, ldb, pixels, of);
        break;
      case 2:
        outer_tile<T, 2, NV>(to, ldo, valid, shifted, n_terms, a_at, ldb, pixels, of);
        break;
      default:
        outer_tile<T, 1, NV>(to, ldo, valid, shifted, n_terms, a_at, ldb, pixels, of);
        break;
    }
  }
}

// out [m, cols] (+)= sum over terms (at most 2) and pixels of a_p b_p; rows of b are ldb (whole vectors) long.
template <class T>
inline void outer_product(T* out, int64_t m, int64_t cols, const OuterTerm<T>* terms, int n_terms, const int32_t* a_at, int64_t ldb,
                          int64_t pixels, const OuterEnd<T>& end) {
  constexpr int64_t L = kLanes<T>, kPanel = kTileVecs * L, kFew = 16 * 1024, kMany = 128 * 1024;  // bytes, of an L1 of 32 KiB
  // If b of a few pixels stays in L1 and `out` is large, writing `out` is the bottleneck. Rows are then written from end to end.
  const bool by_rows = n_terms * pixels * ldb * int64_t(sizeof(T)) <= kFew && m * cols * int64_t(sizeof(T)) > kMany;
  const int64_t rows = by_rows ? kOuterRows : m;
  OuterTerm<T> shifted[2];
  for (int64_t i = 0; i < m; i += rows) {
    const int64_t some = m - i < rows ? m - i : rows;
    for (int64_t j = 0; j < ldb; j += kPanel) {
      for (int t = 0; t < n_terms; ++t) shifted[t] = {terms[t].a + i, terms[t].b + j};
      const int64_t at = i * cols + j;
      if (j + kPanel <= ldb)
        outer_panel<T, kTileVecs>(out + at, cols, cols - j, some, shifted, n_terms, a_at, ldb, pixels, end.at(at));
      else
        outer_panel<T, 1>(out + at, cols, cols - j, some, shifted, n_terms, a_at, ldb, pixels, end.at(at));
    }
  }
}

// Room for copies of a and b. If the columns of a lie far apart, a tile uses half of each cache line it loads,
// and every panel loads the lines again. If `out` is large, writing one panel leaves each page after a line or two.
template <class T>
struct OuterPack {
  T *a[2], *b[2];
  int32_t* at;
  static int64_t a_size(int64_t pixels) { return kOuterRows * pixels; }
  static int64_t b_size(int64_t cols, int64_t pixels) { return padded_cols<T>(cols) * pixels; }
  static bool pays_off(int64_t m, int64_t cols, int64_t pixels) {
    constexpr int64_t kBytes = sizeof(T), kNear = 32 * 1024, kSmall = 128 * 1024, kNarrow = 256;  // an L1; a part of L2; a few panels
    const bool far = cols > kTileVecs * kLanes<T> && m * pixels * kBytes > kNear;
    return far || (cols * kBytes > kNarrow && m * cols * kBytes > kSmall);
  }
};

// outer_product through copies. Rows of b are cols long. A few rows of `out` are finished, from end to end, before the next ones.
template <class T>
inline void packed_outer_product(T* out, int64_t m, int64_t cols, const OuterTerm<T>* terms, int n_terms, const int32_t* a_at,
                                 int64_t pixels, const OuterEnd<T>& end, const OuterPack<T>& room) {
  constexpr int64_t L = kLanes<T>, kPanel = kTileVecs * L;
  const int64_t ldb = padded_cols<T>(cols);
  for (int64_t p = 0; p < pixels; ++p) room.at[p] = int32_t(p * kOuterRows);
  for (int t = 0; t < n_terms; ++t) {
    T* to = room.b[t];
    for (int64_t j = 0; j < ldb; j += kPanel) {
      const int64_t ld = ldb - j < kPanel ? ldb - j : kPanel, valid = cols - j < ld ? cols - j : ld;
      for (int64_t p = 0; p < pixels; ++p, to += ld) {
        std::memcpy(to, terms[t].b + p * cols + j, size_t(valid) * sizeof(T));
        for (int64_t c = valid; c < ld; ++c) to[c] = T(0);
      }
    }
  }
  for (int64_t i = 0; i < m; i += kOuterRows) {
    const int64_t rows = m - i < kOuterRows ? m - i : kOuterRows;
    for (int t = 0; t < n_terms; ++t)
      for (int64_t p = 0; p < pixels; ++p)
        if (rows == kOuterRows)
          std::memcpy(room.a[t] + p * kOuterRows, terms[t].a + a_at[p] + i, kOuterRows * sizeof(T));
        else
          std::memcpy(room.a[t] + p * kOuterRows, terms[t].a + a_at[p] + i, size_t(rows) * sizeof(T));
    OuterTerm<T> packed[2];
    for (int64_t j = 0; j < ldb; j += kPanel) {
      for (int t = 0; t < n_terms; ++t) packed[t] = {room.a[t], room.b[t] + j * pixels};
      T* to = out + i * cols + j;
      const OuterEnd<T> of = end.at(i * cols + j);
      if (j + kPanel <= ldb)
        outer_panel<T, kTileVecs>(to, cols, cols - j, rows, packed, n_terms, room.at, kPanel, pixels, of);
      else
        outer_panel<T, 1>(to, cols, cols - j, rows, packed, n_terms, room.at, L, pixels, of);
    }
  }
}

// Copies rows of `cols` numbers into rows of whole vectors, the rest zero.
template <class T>
inline void pad_rows(T* to, const T* from, int64_t rows, int64_t cols, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(to + r * ld, from + r * cols, size_t(cols) * sizeof(T));
    for (int64_t c = cols; c < ld; ++c) to[r * ld + c] = T(0);
  }
}

FASTMAML_CPU_END
