// Convolutions as products (implicit GEMM), as Forms of gemm_tile.cuh.     x [N, H, W, C]   w [KH, KW, C, F]   y [N, OH, OW, F]
//   forward:         rows are pixels of y, k = (kh, kw, c), columns are filters
//   backward-data:   rows are pixels of x, k = (taps that reach them, f), columns are channels.
//                    Pixels reached by the same taps form a phase. There are stride_h x stride_w phases, each its own product.
//   backward-weight: rows are (kh, kw, c), k = pixels of y, columns are filters
#pragma once

#include "cuda/kernels/gemm.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

struct ConvSizes {  // layers.h's Conv2d
  int N, C, H, W, F, OH, OW, KH, KW, stride_h, stride_w, pad_h, pad_w;
};

// A cursor (a, b, c) into [.., width, depth] that moves on by n.
struct Tap {
  int a, b, c;
  __device__ void step(int n, int width, int depth) {
    for (c += n; c >= depth; c -= depth)
      if (++b == width) {
        b = 0;
        ++a;
      }
  }
};

// Where the pixels of one tile row lie.
struct alignas(16) Window {
  int at;    // offset of the first tap's pixel
  int h, w;  // the first tap's place in the image; may lie outside
  int out;   // the row of `out`; negative: none
};

// Tap (a, b) of a window meets the pixel at (h + direction a, w + direction b) of an image [N, H, W, C]. k = (a, b, c).
template <int direction>
struct WindowSource {
  static constexpr Order kOrder = Order::along_k;
  using Row = int;
  using K = Tap;
  const Window* windows;  // in shared memory
  int H, W, C, taps_h, taps_w;

  __device__ Row row(int r) const { return r; }
  __device__ K at_k(int k) const {
    Tap tap = {0, 0, 0};
    step(tap, k);
    return tap;
  }
  __device__ void step(Tap& tap, int n) const { tap.step(n, taps_w, C); }
  __device__ bool find(Row row, const Tap& tap, int& from) const {
    const Window window = windows[row];
    const int h = window.h + direction * tap.a, w = window.w + direction * tap.b;
    from = window.at + direction * (tap.a * W + tap.b) * C + tap.c;
    return unsigned(h) < unsigned(H) && unsigned(w) < unsigned(W) && tap.a < taps_h;
  }
};

struct ConvForward {
  static constexpr bool kSums = false;
  static constexpr int kTable = 1;
  ConvSizes s;

  int row_tiles(int tile_rows) const { return (s.N * s.OH * s.OW + tile_rows - 1) / tile_rows; }

  template <class Tile>
  struct Block {
    using A = WindowSource<1>;
    using B = Matrix<Order::along_rows>;
    const A a;
    const B b;
    const int depth, cols, first_col;

    __device__ Block(const ConvForward& form, int row_tile, int col_tile, void* table)
        : a{static_cast<const Window*>(table), form.s.H, form.s.W, form.s.C, form.s.KH, form.s.KW},
          b{col_tile * Tile::kCols, form.s.F, form.s.KH * form.s.KW * form.s.C, form.s.F},
          depth(b.depth),
          cols(form.s.F),
          first_col(b.first_row) {
      const ConvSizes& s = form.s;
      for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
        const int pixel = row_tile * Tile::kRows + r, n = pixel / (s.OH * s.OW), oh = pixel / s.OW % s.OH, ow = pixel % s.OW;
        const int h = oh * s.stride_h - s.pad_h, w = ow * s.stride_w - s.pad_w;
        static_cast<Window*>(table)[r] = n < s.N ? Window{((n * s.H + h) * s.W + w) * s.C, h, w, pixel} : Window{0, -form.s.KH, 0, -1};
      }
      __syncthreads();
    }
    __device__ bool empty() const { return false; }
    __device__ int out_row(int r) const { return a.windows[r].out; }
  };
};

// Along one axis: the taps phase, phase + stride, ... reach the pixels first, first + stride, ...
struct Phase {
  int phase, first, pixels, taps, origin;  // origin: the output pixel that meets `first` through tap `phase`
  __device__ Phase(int phase, int size, int stride, int pad, int kernel) : phase(phase) {
    first = (phase + stride - pad % stride) % stride;
    pixels = first < size ? (size - first + stride - 1) / stride : 0;
    taps = phase < kernel ? (kernel - phase + stride - 1) / stride : 0;
    origin = (first + pad - phase) / stride;
  }
};

// Filters w [KH, KW, C, F] with their channels as rows and k = (a, b, f), over the taps (phase_h + a stride_h, phase_w + b stride_w).
struct PhaseFilters {
  static constexpr Order kOrder = Order::along_k;
  using Row = int;
  using K = Tap;
  int first_row, C, F, taps_h, taps_w;
  int at, step_h, step_w;  // offset of the first tap, and the distance between taps

  __device__ Row row(int r) const { return first_row + r; }
  __device__ K at_k(int k) const {
    Tap tap = {0, 0, 0};
    step(tap, k);
    return tap;
  }
  __device__ void step(Tap& tap, int n) const { tap.step(n, taps_w, F); }
  __device__ void step(Row& row, int n) const { row += n; }
  __device__ bool find(Row row, const Tap& tap, int& from) const {
    from = at + tap.a * step_h + tap.b * step_w + row * F + tap.c;
    return row < C && tap.a < taps_h;
  }
};

struct ConvBackwardData {
  static constexpr bool kSums = false;
  static constexpr int kTable = 1;
  ConvSizes s;

  __host__ __device__ int tiles_per_phase(int tile_rows) const {
    const int rows = (s.H + s.stride_h - 1) / s.stride_h, cols = (s.W + s.stride_w - 1) / s.stride_w;
    return (s.N * rows * cols + tile_rows - 1) / tile_rows;
  }
  int row_tiles(int tile_rows) const { return s.stride_h * s.stride_w * tiles_per_phase(tile_rows); }

  template <class Tile>
  struct Block {
    using A = WindowSource<-1>;
    using B = PhaseFilters;
    const int tiles, tile;  // within this phase
    const Phase h, w;
    const A a;
    const B b;
    const int depth, cols, first_col;

    __device__ Block(const ConvBackwardData& form, int row_tile, int col_tile, void* table)
        : tiles(form.tiles_per_phase(Tile::kRows)),
          tile(row_tile % tiles),
          h(row_tile / tiles / form.s.stride_w, form.s.H, form.s.stride_h, form.s.pad_h, form.s.KH),
          w(row_tile / tiles % form.s.stride_w, form.s.W, form.s.stride_w, form.s.pad_w, form.s.KW),
          a{static_cast<const Window*>(table), form.s.OH, form.s.OW, form.s.F, h.taps, w.taps},
          b{col_tile * Tile::kCols,
            form.s.C,
            form.s.F,
            h.taps,
            w.taps,
            (h.phase * form.s.KW + w.phase) * form.s.C * form.s.F,
            form.s.stride_h * form.s.KW * form.s.C * form.s.F,
            form.s.stride_w * form.s.C * form.s.F},
          depth(h.taps * w.taps * form.s.F),
          cols(form.s.C),
          first_col(b.first_row) {
      const ConvSizes& s = form.s;
      if (empty()) return;
      for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) {
        const int pixel = tile * Tile::kRows + r, line = pixel / w.pixels, i = line % h.pixels, j = pixel % w.pixels, n = line / h.pixels;
        const int oh = h.origin + i, ow = w.origin + j;
        static_cast<Window*>(table)[r] = n < s.N ? Window{((n * s.OH + oh) * s.OW + ow) * s.F, oh, ow,
                                                          (n * s.H + h.first + i * s.stride_h) * s.W + w.first + j * s.stride_w}
                                                 : Window{0, -1, 0, -1};
      }
      __syncthreads();
    }
    __device__ bool empty() const { return h.pixels * w.pixels == 0; }
    __device__ int out_row(int r) const { return a.windows[r].out; }
  };
};

// Output pixel number i: at (oh, ow) of image n.
struct Pixel {
  int i, n, oh, ow;
};

// Rows are (kh, kw, c) from first_row on; the k's are output pixels.
struct PatchSource {
  static constexpr Order kOrder = Order::along_rows;
  using Row = Tap;
  using K = Pixel;
  const ConvSizes s;
  int first_row;

  __device__ Row row(int r) const {
    const int at = first_row + r, tap = at / s.C;
    return {tap / s.KW, tap % s.KW, at % s.C};
  }
  __device__ void step(Tap& tap, int n) const { tap.step(n, s.KW, s.C); }
  __device__ K at_k(int k) const { return {k, k / (s.OH * s.OW), k / s.OW % s.OH, k % s.OW}; }
  __device__ void step(Pixel& pixel, int n) const {
    pixel.i += n;
    for (pixel.ow += n; pixel.ow >= s.OW; pixel.ow -= s.OW)
      if (++pixel.oh == s.OH) {
        pixel.oh = 0;
        ++pixel.n;
      }
  }
  __device__ bool find(const Tap& tap, const Pixel& pixel, int& from) const {
    const int h = pixel.oh * s.stride_h - s.pad_h + tap.a, w = pixel.ow * s.stride_w - s.pad_w + tap.b;
    from = ((pixel.n * s.H + h) * s.W + w) * s.C + tap.c;
    return unsigned(h) < unsigned(s.H) && unsigned(w) < unsigned(s.W) && tap.a < s.KH && pixel.n < s.N;
  }
};

struct ConvBackwardWeight {
  static constexpr bool kSums = true;
  static constexpr int kTable = 0;
  ConvSizes s;

  int row_tiles(int tile_rows) const { return (s.KH * s.KW * s.C + tile_rows - 1) / tile_rows; }

  template <class Tile>
  struct Block {
    using A = PatchSource;
    using B = Matrix<Order::along_rows>;
    const A a;
    const B b;
    const int depth, cols, first_col;

    __device__ Block(const ConvBackwardWeight& form, int row_tile, int col_tile, void*)
        : a{form.s, row_tile * Tile::kRows},
          b{col_tile * Tile::kCols, form.s.F, form.s.N * form.s.OH * form.s.OW, form.s.F},
          depth(b.depth),
          cols(form.s.F),
          first_col(b.first_row) {}
    __device__ bool empty() const { return false; }
    __device__ int out_row(int r) const { return a.first_row + r < a.s.KH * a.s.KW * a.s.C ? a.first_row + r : -1; }
  };
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
