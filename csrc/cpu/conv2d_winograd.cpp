#include "cpu/conv2d_winograd.h"

#include <algorithm>

#include "cpu/kernels/row_product.h"
#include "cpu/kernels/winograd.h"

FASTMAML_CPU_BEGIN
namespace {

constexpr int64_t kChannelUnit = 16;  // whole vectors on every machine, so that all machines choose alike
// Bytes of transformed tiles in flight. Products read their tiles from L1.
// Gradients by the filters add up in L2; more tiles at a time then pay.
constexpr int64_t kProductBytes = 48 * 1024, kGradientBytes = 96 * 1024;

Tiling forward_tiling(const Conv2d& s) { return {s.H, s.W, s.C, s.pad_h, s.pad_w, s.OH, s.OW}; }
// dx is the product of dy, padded for a full correlation, with the filters turned by 180 degrees.
Tiling data_tiling(const Conv2d& s) { return {s.OH, s.OW, s.F, s.KH - 1 - s.pad_h, s.KW - 1 - s.pad_w, s.H, s.W}; }

template <class T>
int64_t block_tiles(const Conv2d& s, ConvKind kind) {
  const int64_t fit = (kind == ConvKind::weight ? kGradientBytes : kProductBytes) / (kPoints * std::max(s.C, s.F) * int64_t(sizeof(T)));
  return std::max<int64_t>(fit / kTileRows * kTileRows, kTileRows);
}

template <class T>
struct Work {
  int64_t block;
  int32_t* a_at;  // start of each tile's channels
  T* u[2];        // transformed filters of w and w_dot; weight gradient: u[0] is the gradient by them
  T* v[2];        // tiles of the input and its tangent
  T* m;           // products; weight gradient: z[0]
  T* z[2];        // tiles of dy and its tangent
  T* transposed;  // filters [9, F, C]
  T* zeros;
  Term<T>* terms;

  Work(Scratch& scratch, const Conv2d& s, ConvKind kind) {
    const int64_t filter = s.C * s.F, in = kind == ConvKind::data ? s.F : s.C, out = kind == ConvKind::data ? s.C : s.F;
    block = block_tiles<T>(s, kind);
    a_at = scratch.take<int32_t>(block);
    u[0] = scratch.take<T>(kPoints * filter);
    u[1] = kind == ConvKind::weight ? nullptr : scratch.take<T>(kPoints * filter);
    for (T*& p : v) p = scratch.take<T>(kPoints * block * in);
    m = kind == ConvKind::weight ? nullptr : scratch.take<T>(kPoints * block * out);
    for (T*& p : z) p = kind == ConvKind::weight ? scratch.take<T>(kPoints * block * out) : nullptr;
    transposed = kind == ConvKind::data ? scratch.take<T>(9 * filter) : nullptr;
    zeros = scratch.take<T>(in);
    terms = scratch.take<Term<T>>(2 * term_count<T>(in));
    if (!zeros) return;
    std::fill(zeros, zeros + in, T(0));
    for (int64_t i = 0; i < block; ++i) a_at[i] = int32_t(i * in);
  }
};

// One output of `products`: y = x * u_for_x + x_dot * u_for_x_dot. Either term may be absent.
template <class T>
struct Product {
  T* y;
  const T* bias;
  const T *u_for_x, *u_for_x_dot;
};

template <class T>
void products(const Tiling& s, int64_t N, int64_t out, const Work<T>& work, const T* x, const T* x_dot, const Product<T>* made, int count) {
  const int64_t ldv = work.block * s.C, ldm = work.block * out, shift = work.v[1] - work.v[0], tiles = s.tiles(N);
  for (int64_t first = 0; first < tiles; first += work.block) {
    const int64_t rows = std::min(work.block, tiles - first);
    winograd_input(work.v[0], ldv, x, s, first, rows, work.zeros);
    if (x_dot) winograd_input(work.v[1], ldv, x_dot, s, first, rows, work.zeros);
    for (int i = 0; i < count; ++i) {
      const Product<T>& p = made[i];
      for (int64_t point = 0; point < kPoints; ++point) {
        int n = 0;
        if (p.u_for_x) n += split_term(work.terms, 0, p.u_for_x + point * s.C * out, s.C, out);
        if (p.u_for_x_dot) n += split_term(work.terms + n, shift, p.u_for_x_dot + point * s.C * out, s.C, out);
        row_product(RowProduct<T>{work.m + point * ldm, nullptr, work.v[0] + point * ldv, work.a_at, rows, out, out, nullptr}, work.terms,
                    n);
      }
      winograd_output(p.y, work.m, ldm, out, p.bias, s, first, rows);
    }
  }
}

}  // namespace

bool takes_winograd(const Conv2d& s) {
  if (s.KH != 3 || s.KW != 3 || s.stride_h != 1 || s.stride_w != 1 || s.pad_h > 2 || s.pad_w > 2) return false;
  if (s.C % kChannelUnit || s.F % kChannelUnit) return false;
  const Tiling tiling = forward_tiling(s);
  return 9 * s.OH * s.OW * 2 >= 3 * kPoints * tiling.TH * tiling.TW;  // at least 1.5 times fewer multiplications
}

template <class T>
size_t winograd_scratch(const Conv2d& s, ConvKind kind) {
  Scratch scratch(nullptr);
  Work<T>(scratch, s, kind);
  return scratch.used();
}

template <class T>
void winograd_forward(const Conv2d& s, int64_t N, void* scratch, const T* x, const T* x_dot, const T* const* w,
                      const ConvOutput<T>* outputs, int n_outputs) {
  Scratch place(scratch);
  Work<T> work(place, s, ConvKind::forward);
  for (int i = 0; i < 2; ++i)
    if (w[i]) winograd_filter(work.u[i], w[i], s.C * s.F, false);
  const T* const u[2] = {work.u[0], work.u[1]};
  const auto transformed = [&u, w](const T* which) -> const T* { return which ? u[which != w[0]] : nullptr; };
  Product<T> made[2];
  for (int i = 0; i < n_outputs; ++i)
    made[i] = {outputs[i].y, outputs[i].bias, transformed(outputs[i].w_for_x), x_dot ? transformed(outputs[i].w_for_x_dot) : nullptr};
  products(forward_tiling(s), N, s.F, work, x, x_dot, made, n_outputs);
}

template <class T>
void winograd_backward_data(const Conv2d& s, int64_t N, void* scratch, T* dx, T* dx_dot, const T* dy, const T* dy_dot, const T* w,
                            const T* w_dot) {
  Scratch place(scratch);
  Work<T> work(place, s, ConvKind::data);
  const T* filters[2] = {w, w_dot};
  for (int i = 0; i < 2; ++i) {
    if (!filters[i]) continue;
    for (int64_t k = 0; k < 9; ++k) transpose(work.transposed + k * s.F * s.C, filters[i] + k * s.C * s.F, s.C, s.F, s.C);
    winograd_filter(work.u[i], work.transposed, s.F * s.C, true);
  }
  Product<T> made[2];
  int n = 0;
  if (dx) made[n++] = {dx, nullptr, work.u[0], nullptr};
  if (dx_dot) made[n++] = {dx_dot, nullptr, w_dot ? work.u[1] : nullptr, dy_dot ? work.u[0] : nullptr};
  products(data_tiling(s), N, s.C, work, dy, dy_dot, made, n);
}

template <class T>
void winograd_backward_weight(const Conv2d& s, int64_t N, void* scratch, T* dw, const T* const* x, const T* const* dy, int n_terms) {
  Scratch place(scratch);
  Work<T> work(place, s, ConvKind::weight);
  const Tiling tiling = forward_tiling(s);
  const int64_t ldv = work.block * s.C, ldz = work.block * s.F, tiles = tiling.tiles(N);
  for (int64_t first = 0; first < tiles; first += work.block) {
    const int64_t pixels = std::min(work.block, tiles - first);
    for (int i = 0; i < n_terms; ++i) {
      winograd_input(work.v[i], ldv, x[i], tiling, first, pixels, work.zeros);
      winograd_gradient(work.z[i], ldz, dy[i], s.F, tiling, first, pixels);
    }
    for (int64_t point = 0; point < kPoints; ++point) {
      OuterTerm<T> terms[2];
      for (int i = 0; i < n_terms; ++i) terms[i] = {work.v[i] + point * ldv, work.z[i] + point * ldz};
      outer_product(work.u[0] + point * s.C * s.F, s.C, s.F, terms, n_terms, work.a_at, s.F, pixels, OuterEnd<T>{first == 0});
    }
  }
  winograd_filter_gradient(dw, work.u[0], s.C * s.F);
}

#define FASTMAML_WINOGRAD(T)                                                                                                        \
  template size_t winograd_scratch<T>(const Conv2d&, ConvKind);                                                                     \
  template void winograd_forward<T>(const Conv2d&, int64_t, void*, const T*, const T*, const T* const*, const ConvOutput<T>*, int); \
  template void winograd_backward_data<T>(const Conv2d&, int64_t, void*, T*, T*, const T*, const T*, const T*, const T*);           \
  template void winograd_backward_weight<T>(const Conv2d&, int64_t, void*, T*, const T* const*, const T* const*, int);
FASTMAML_WINOGRAD(float)
FASTMAML_WINOGRAD(double)
#undef FASTMAML_WINOGRAD

FASTMAML_CPU_END
