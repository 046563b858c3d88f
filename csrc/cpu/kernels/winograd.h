// Winograd's F(2x2, 3x3) (Lavin and Gray 2016, section 4.1) for 3x3 products with stride 1. Channels are whole vectors.
// 16 products over overlapping tiles of 4x4 pixels replace the direct ones, with 2.25 times fewer multiplications.
//   y = A^T [(G w G^T) (B^T x B)] A      dw = G^T [(B^T x B) (A dy A^T)] G, its transpose
// Values and tangents use the same transforms, so a tangent adds its two products before one inverse transform.
#pragma once

#include "cpu/vec.h"

FASTMAML_CPU_BEGIN

inline constexpr int kPoints = 16;  // products of a tile

// How 2x2 tiles cover the output of a 3x3 product. Tiles are numbered over [N, TH, TW].
struct Tiling {
  int64_t H, W, C, pad_h, pad_w;  // of the input
  int64_t OH, OW;
  int64_t TH = (OH + 1) / 2, TW = (OW + 1) / 2;
  int64_t tiles(int64_t N) const { return N * TH * TW; }

  // f(n, th, tw, place, run) for stretches of tiles in one row of an image; place counts from `first`.
  template <class F>
  void rows(int64_t first, int64_t count, F f) const {
    for (int64_t place = 0; place < count;) {
      const int64_t tile = first + place, tw = tile % TW, left = count - place, run = TW - tw < left ? TW - tw : left;
      f(tile / (TH * TW), tile / TW % TH, tw, place, run);
      place += run;
    }
  }
};

// v [kPoints][ld = room for tiles x C]: B^T x B of `count` tiles of x [N, H, W, C]. zeros: C of them.
template <class T>
inline void winograd_input(T* v, int64_t ld, const T* x, const Tiling& s, int64_t first, int64_t count, const T* zeros) {
  using V = Vec<T>;
  s.rows(first, count, [&](int64_t n, int64_t th, int64_t tw, int64_t place, int64_t run) {
    const T* row[4];
    int64_t step[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t h = 2 * th - s.pad_h + i;
      const bool inside = h >= 0 && h < s.H;
      row[i] = inside ? x + (n * s.H + h) * s.W * s.C : zeros;
      step[i] = inside ? s.C : 0;
    }
    for (int64_t c = 0; c < s.C; c += kLanes<T>) {
      const auto column = [&](int64_t w, V* t) {
        if (w < 0 || w >= s.W) {
          for (int i = 0; i < 4; ++i) t[i] = V{};
          return;
        }
        V d[4];
        for (int i = 0; i < 4; ++i) d[i] = load<V>(row[i] + w * step[i] + c);
        t[0] = d[0] - d[2];
        t[1] = d[1] + d[2];
        t[2] = d[2] - d[1];
        t[3] = d[1] - d[3];
      };
      V t[4][4];  // columns; the next tile reuses two
      int64_t w = 2 * tw - s.pad_w;
      column(w, t[0]);
      column(w + 1, t[1]);
      T* to = v + place * s.C + c;
      for (int64_t i = 0; i < run; ++i, to += s.C, w += 2) {
        column(w + 2, t[2]);
        column(w + 3, t[3]);
        for (int r = 0; r < 4; ++r) {
          store(to + (4 * r + 0) * ld, t[0][r] - t[2][r]);
          store(to + (4 * r + 1) * ld, t[1][r] + t[2][r]);
          store(to + (4 * r + 2) * ld, t[2][r] - t[1][r]);
          store(to + (4 * r + 3) * ld, t[1][r] - t[3][r]);
          t[0][r] = t[2][r];
          t[1][r] = t[3][r];
        }
      }
    }
  });
}

// y [N, OH, OW, F] = bias + A^T m A, for the tiles of m [kPoints][ld = room for tiles x F].
template <class T>
inline void winograd_output(T* y, const T* m, int64_t ld, int64_t F, const T* bias, const Tiling& s, int64_t first, int64_t count) {
  using V = Vec<T>;
  s.rows(first, count, [&](int64_t n, int64_t th, int64_t tw, int64_t place, int64_t run) {
    const int rows = 2 * th + 1 < s.OH ? 2 : 1;
    for (int64_t i = 0; i < run; ++i) {
      const int cols = 2 * (tw + i) + 1 < s.OW ? 2 : 1;
      T* to = y + ((n * s.OH + 2 * th) * s.OW + 2 * (tw + i)) * F;
      for (int64_t f = 0; f < F; f += kLanes<T>) {
        const T* from = m + (place + i) * F + f;
        V sum[2][4];
        for (int j = 0; j < 4; ++j) {
          const V p0 = load<V>(from + j * ld), p1 = load<V>(from + (4 + j) * ld), p2 = load<V>(from + (8 + j) * ld),
                  p3 = load<V>(from + (12 + j) * ld);
          sum[0][j] = p0 + p1 + p2;
          sum[1][j] = p1 - p2 - p3;
        }
        const V b = bias ? load<V>(bias + f) : V{};
        for (int r = 0; r < rows; ++r) {
          store(to + r * s.OW * F + f, b + (sum[r][0] + sum[r][1] + sum[r][2]));
          if (cols == 2) store(to + (r * s.OW + 1) * F + f, b + (sum[r][1] - sum[r][2] - sum[r][3]));
        }
      }
    }
  });
}

// z [kPoints][ld = room for tiles x F]: A dy A^T of the tiles of dy [N, OH, OW, F].
template <class T>
inline void winograd_gradient(T* z, int64_t ld, const T* dy, int64_t F, const Tiling& s, int64_t first, int64_t count) {
  using V = Vec<T>;
  s.rows(first, count, [&](int64_t n, int64_t th, int64_t tw, int64_t place, int64_t run) {
    const bool two_rows = 2 * th + 1 < s.OH;
    for (int64_t i = 0; i < run; ++i) {
      const bool two_cols = 2 * (tw + i) + 1 < s.OW;
      const T* from = dy + ((n * s.OH + 2 * th) * s.OW + 2 * (tw + i)) * F;
      for (int64_t f = 0; f < F; f += kLanes<T>) {
        const V d00 = load<V>(from + f), d01 = two_cols ? load<V>(from + F + f) : V{}, d10 = two_rows ? load<V>(from + s.OW * F + f) : V{},
                d11 = two_rows && two_cols ? load<V>(from + (s.OW + 1) * F + f) : V{};
        const V t[4][2] = {{d00, d01}, {d00 + d10, d01 + d11}, {d00 - d10, d01 - d11}, {-d10, -d11}};
        T* to = z + (place + i) * F + f;
        for (int r = 0; r < 4; ++r) {
          store(to + (4 * r + 0) * ld, t[r][0]);
          store(to + (4 * r + 1) * ld, t[r][0] + t[r][1]);
          store(to + (4 * r + 2) * ld, t[r][0] - t[r][1]);
          store(to + (4 * r + 3) * ld, -t[r][1]);
        }
      }
    }
  });
}

// u [kPoints][size] = G w G^T of the filters w [9][size]; flipped: of w turned by 180 degrees.
template <class T>
inline void winograd_filter(T* u, const T* w, int64_t size, bool flipped) {
  using V = Vec<T>;
  const V half = broadcast<V>(T(0.5));
  const auto spread = [&](V g0, V g1, V g2, V* t) {
    t[0] = g0;
    t[1] = half * (g0 + g1 + g2);
    t[2] = half * (g0 - g1 + g2);
    t[3] = g2;
  };
  // Turning swaps the outer rows and columns of the points. The inner ones are symmetric.
  const auto turned = [&](int i) { return flipped && (i == 0 || i == 3) ? 3 - i : i; };
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    V g[9], t[3][4];
    for (int k = 0; k < 9; ++k) g[k] = load<V>(w + k * size + i);
    for (int j = 0; j < 3; ++j) spread(g[j], g[3 + j], g[6 + j], t[j]);
    for (int r = 0; r < 4; ++r) {
      V row[4];
      spread(t[0][r], t[1][r], t[2][r], row);
      for (int q = 0; q < 4; ++q) store(u + (4 * turned(r) + turned(q)) * size + i, row[q]);
    }
  }
}

// dw [9][size] = G^T du G of du [kPoints][size].
template <class T>
inline void winograd_filter_gradient(T* dw, const T* du, int64_t size) {
  using V = Vec<T>;
  const V half = broadcast<V>(T(0.5));
  const auto gather = [&](V p0, V p1, V p2, V p3, V* t) {
    t[0] = p0 + half * (p1 + p2);
    t[1] = half * (p1 - p2);
    t[2] = half * (p1 + p2) + p3;
  };
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    V t[4][3];
    for (int q = 0; q < 4; ++q) {
      V p[4];
      for (int r = 0; r < 4; ++r) p[r] = load<V>(du + (4 * r + q) * size + i);
      gather(p[0], p[1], p[2], p[3], t[q]);
    }
    for (int r = 0; r < 3; ++r) {
      V row[3];
      gather(t[0][r], t[1][r], t[2][r], t[3][r], row);
      for (int q = 0; q < 3; ++q) store(dw + (3 * r + q) * size + i, row[q]);
    }
  }
}

FASTMAML_CPU_END
