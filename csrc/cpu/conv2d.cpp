// conv2d on [N, H, W, C] images with filters [KH, KW, C, F]: row products over padded copies of a few images at a time.
// The KW C numbers under one row of the filter are neighbours, so no im2col is needed.
// Backward-data is the same product, over the padded gradient with flipped, transposed filters, once for each phase of the stride.
#include <algorithm>

#include "cpu/conv2d_winograd.h"
#include "cpu/cpu.h"
#include "cpu/kernels/row_product.h"

FASTMAML_CPU_BEGIN
namespace {

constexpr int64_t kChunkBytes = 256 * 1024;  // padded images of one chunk, which stay in L2

// A stack of zero-padded images.
struct Padded {
  int64_t H, W, C, top, left, HP, WP;
  int64_t size() const { return HP * WP * C; }
};

Padded padded_input(const Conv2d& s) { return {s.H, s.W, s.C, s.pad_h, s.pad_w, s.H + 2 * s.pad_h, s.W + 2 * s.pad_w}; }

// Padded for every (ih + pad - kh) / stride that a pixel of the input reads.
Padded padded_gradient(const Conv2d& s) {
  const int64_t top = (s.KH - 1) / s.stride_h, left = (s.KW - 1) / s.stride_w;
  const int64_t rows = (s.H - 1 + s.pad_h) / s.stride_h + 1, cols = (s.W - 1 + s.pad_w) / s.stride_w + 1;
  return {s.OH, s.OW, s.F, top, left, top + (rows > s.OH ? rows : s.OH), left + (cols > s.OW ? cols : s.OW)};
}

template <class T>
int64_t chunk_images(const Padded& p, int64_t N) {
  const int64_t fit = kChunkBytes / (p.size() * int64_t(sizeof(T)));
  return fit < 1 ? 1 : fit < N ? fit : N;
}

template <class T>
void pad_images(T* to, const T* from, int64_t count, const Padded& p) {
  if (p.HP == p.H && p.WP == p.W) {
    std::memcpy(to, from, size_t(count * p.size()) * sizeof(T));
    return;
  }
  std::memset(to, 0, size_t(count * p.size()) * sizeof(T));
  for (int64_t n = 0; n < count; ++n)
    for (int64_t h = 0; h < p.H; ++h)
      std::memcpy(to + ((n * p.HP + h + p.top) * p.WP + p.left) * p.C, from + (n * p.H + h) * p.W * p.C, size_t(p.W * p.C) * sizeof(T));
}

template <class T>
struct Work {
  T* image[2];             // padded images of a chunk and their tangents
  int32_t *a_at, *out_at;  // where the rows of the product start
  T* filter[2];            // filters in whole vectors; backward-data: flipped and transposed
  Term<T>* terms;
  T* rows[2];  // dy, dy_dot in whole vectors

  Work(Scratch& scratch, const Conv2d& s, int64_t N, ConvKind kind) {
    const Padded p = kind == ConvKind::data ? padded_gradient(s) : padded_input(s);
    const int64_t images = chunk_images<T>(p, N), taps = s.KH * s.KW;
    const int64_t in_pixels = s.H * s.W, out_pixels = s.OH * s.OW, pixels = in_pixels > out_pixels ? in_pixels : out_pixels;
    for (T*& i : image) i = scratch.take<T>(images * p.size());
    a_at = scratch.take<int32_t>(images * pixels);
    out_at = scratch.take<int32_t>(images * pixels);
    for (T*& f : filter)
      f = kind == ConvKind::weight
              ? nullptr
              : scratch.take<T>(taps * (kind == ConvKind::data ? s.F * padded_cols<T>(s.C) : s.C * padded_cols<T>(s.F)));
    terms = scratch.take<Term<T>>(2 * s.KH * term_count<T>(s.KW * (s.C > s.F ? s.C : s.F)));
    for (T*& r : rows) r = kind == ConvKind::weight ? scratch.take<T>(kBlockPixels * padded_cols<T>(s.F)) : nullptr;
  }
};

template <class T, ConvKind kind>
size_t scratch_bytes(const Step& step, const Layer& layer) {
  const Conv2d& s = *std::get_if<Conv2d>(&layer);
  Scratch direct(nullptr), sums(nullptr);
  Work<T>(direct, s, step.examples, kind);
  if (kind == ConvKind::weight) sums.take<double>(s.F);  // for the bias gradient, which comes last
  return std::max(takes_winograd(s) ? winograd_scratch<T>(s, kind) : direct.used(), sums.used());
}

// Start of every output pixel's window in the padded images of a chunk.
template <class T>
void window_starts(int32_t* a_at, const Conv2d& s, const Padded& p, int64_t count) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t h = 0; h < s.OH; ++h)
      for (int64_t w = 0; w < s.OW; ++w) *a_at++ = int32_t(((n * p.HP + h * s.stride_h) * p.WP + w * s.stride_w) * p.C);
}

template <class T>
void forward(const Call& call, const T* x, const T* x_dot, const T* const* w, const ConvOutput<T>* outputs, int n_outputs) {
  const Conv2d& s = *std::get_if<Conv2d>(&call.layer);
  const int64_t N = call.step.examples, ldb = padded_cols<T>(s.F);
  if (takes_winograd(s)) return winograd_forward(s, N, call.scratch, x, x_dot, w, outputs, n_outputs);
  Scratch scratch(call.scratch);
  Work<T> work(scratch, s, N, ConvKind::forward);
  const T* filter[2];  // in whole vectors
  for (int i = 0; i < 2; ++i) {
    filter[i] = w[i];
    if (!w[i] || ldb == s.F) continue;
    pad_rows(work.filter[i], w[i], s.KH * s.KW * s.C, s.F, ldb);
    filter[i] = work.filter[i];
  }
  const auto packed = [&](const T* which) { return which == w[0] ? filter[0] : filter[1]; };
  const Padded p = padded_input(s);
  const int64_t chunk = chunk_images<T>(p, N), image = s.H * s.W * s.C, made = s.OH * s.OW * s.F;
  const int64_t shift = work.image[1] - work.image[0];
  window_starts<T>(work.a_at, s, p, chunk);
  for (int64_t n = 0; n < N; n += chunk) {
    const int64_t count = N - n < chunk ? N - n : chunk;
    pad_images(work.image[0], x + n * image, count, p);
    if (x_dot) pad_images(work.image[1], x_dot + n * image, count, p);
    for (int o = 0; o < n_outputs; ++o) {
      const ConvOutput<T>& out = outputs[o];
      int terms = 0;
      for (int64_t kh = 0; kh < s.KH; ++kh) {
        const int64_t row = kh * s.KW * s.C * ldb, from = kh * p.WP * s.C;
        if (out.w_for_x) terms += split_term(work.terms + terms, from, packed(out.w_for_x) + row, s.KW * s.C, ldb);
        if (out.w_for_x_dot && x_dot) terms += split_term(work.terms + terms, shift + from, packed(out.w_for_x_dot) + row, s.KW * s.C, ldb);
      }
      row_product(RowProduct<T>{out.y + n * made, nullptr, work.image[0], work.a_at, count * s.OH * s.OW, s.F, ldb, out.bias}, work.terms,
                  terms);
    }
  }
}

template <class T>
void conv2d_fwd(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    const T* w[2] = {at<T>(call, 2, t), nullptr};
    ConvOutput<T> y{at<T>(call, 0, t), at<T>(call, 3, t), w[0], nullptr};
    forward<T>(call, at<T>(call, 1, t), nullptr, w, &y, 1);
  }
}

template <class T>
void conv2d_fwd_jvp(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    const T* w[2] = {at<T>(call, 3, t), at<T>(call, 4, t)};
    ConvOutput<T> y_dot{at<T>(call, 0, t), at<T>(call, 5, t), w[1], w[0]};
    forward<T>(call, at<T>(call, 1, t), at<T>(call, 2, t), w, &y_dot, 1);
  }
}

template <class T>
void conv2d_fwd_dual(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    const T* w[2] = {at<T>(call, 4, t), at<T>(call, 5, t)};
    ConvOutput<T> both[2] = {{at<T>(call, 0, t), at<T>(call, 6, t), w[0], nullptr}, {at<T>(call, 1, t), at<T>(call, 7, t), w[1], w[0]}};
    forward<T>(call, at<T>(call, 2, t), at<T>(call, 3, t), w, both, 2);
  }
}

// Pixels ih with (ih + pad) % stride == phase, and the taps kh = phase, phase + stride, ... that reach them.
struct Phase {
  int64_t first, step, taps;
  Phase(int64_t phase, int64_t stride, int64_t pad, int64_t kernel)
      : first(((phase - pad) % stride + stride) % stride),
        step(stride),
        taps(phase < kernel ? (kernel - phase + stride - 1) / stride : 0) {}
};

// Writes [taps_h, taps_w, F, C in whole vectors]: the phase's taps in falling order, each filter transposed.
template <class T>
void pack_flipped(T* to, const T* w, const Conv2d& s, const Phase& ph, const Phase& pw, int64_t rh, int64_t rw) {
  const int64_t ld = padded_cols<T>(s.C);
  for (int64_t h = ph.taps; h-- > 0;)
    for (int64_t v = pw.taps; v-- > 0; to += s.F * ld) {
      const int64_t kh = rh + h * s.stride_h, kw = rw + v * s.stride_w;
      transpose(to, w + (kh * s.KW + kw) * s.C * s.F, s.C, s.F, ld);
    }
}

// dx from (dy, w), and dx_dot from (dy_dot, w) and (dy, w_dot); either may be absent.
template <class T>
void backward_data(const Call& call, T* dx, T* dx_dot, const T* dy, const T* dy_dot, const T* w, const T* w_dot) {
  const Conv2d& s = *std::get_if<Conv2d>(&call.layer);
  const int64_t N = call.step.examples, ldb = padded_cols<T>(s.C);
  if (takes_winograd(s)) return winograd_backward_data(s, N, call.scratch, dx, dx_dot, dy, dy_dot, w, w_dot);
  Scratch scratch(call.scratch);
  Work<T> work(scratch, s, N, ConvKind::data);
  const Padded p = padded_gradient(s);
  const int64_t chunk = chunk_images<T>(p, N), image = s.H * s.W * s.C, made = s.OH * s.OW * s.F;
  const int64_t shift = work.image[1] - work.image[0];
  const bool one_phase = s.stride_h == 1 && s.stride_w == 1;
  for (int64_t n = 0; n < N; n += chunk) {
    const int64_t count = N - n < chunk ? N - n : chunk;
    pad_images(work.image[0], dy + n * made, count, p);
    if (dy_dot) pad_images(work.image[1], dy_dot + n * made, count, p);
    for (int64_t rh = 0; rh < s.stride_h; ++rh)
      for (int64_t rw = 0; rw < s.stride_w; ++rw) {
        const Phase ph(rh, s.stride_h, s.pad_h, s.KH), pw(rw, s.stride_w, s.pad_w, s.KW);
        if (n == 0 || !one_phase) {
          pack_flipped(work.filter[0], w, s, ph, pw, rh, rw);
          if (w_dot) pack_flipped(work.filter[1], w_dot, s, ph, pw, rh, rw);
        }
        int64_t rows = 0;
        for (int64_t i = 0; i < count; ++i)
          for (int64_t h = ph.first; h < s.H; h += ph.step)
            for (int64_t v = pw.first; v < s.W; v += pw.step, ++rows) {
              const int64_t qh = (h + s.pad_h) / s.stride_h + p.top - (ph.taps - 1),
                            qw = (v + s.pad_w) / s.stride_w + p.left - (pw.taps - 1);
              work.a_at[rows] = ph.taps && pw.taps ? int32_t(((i * p.HP + qh) * p.WP + qw) * s.F) : 0;
              work.out_at[rows] = int32_t(((i * s.H + h) * s.W + v) * s.C);
            }
        const auto product = [&](T* out, const T* first, int64_t first_shift, const T* second, int64_t second_shift) {
          int terms = 0;
          for (int64_t h = 0; h < ph.taps; ++h) {
            const int64_t row = h * pw.taps * s.F * ldb, from = h * p.WP * s.F;
            if (pw.taps == 0) continue;
            terms += split_term(work.terms + terms, first_shift + from, first + row, pw.taps * s.F, ldb);
            if (second) terms += split_term(work.terms + terms, second_shift + from, second + row, pw.taps * s.F, ldb);
          }
          row_product(RowProduct<T>{out + n * image, one_phase ? nullptr : work.out_at, work.image[0], work.a_at, rows, s.C, ldb, nullptr},
                      work.terms, terms);
        };
        if (dx) product(dx, work.filter[0], 0, nullptr, 0);
        if (dx_dot) product(dx_dot, work.filter[0], shift, work.filter[1], 0);
      }
  }
}

template <class T>
void conv2d_bwd_data(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t)
    backward_data<T>(call, at<T>(call, 0, t), nullptr, at<T>(call, 1, t), nullptr, at<T>(call, 2, t), nullptr);
}

template <class T>
void conv2d_bwd_data_jvp(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t)
    backward_data<T>(call, nullptr, at<T>(call, 0, t), at<T>(call, 1, t), at<T>(call, 2, t), at<T>(call, 3, t), at<T>(call, 4, t));
}

template <class T>
void conv2d_bwd_data_dual(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t)
    backward_data<T>(call, at<T>(call, 0, t), at<T>(call, 1, t), at<T>(call, 2, t), at<T>(call, 3, t), at<T>(call, 4, t),
                     at<T>(call, 5, t));
}

// dw = sum over terms and pixels of (window of x) dy^T.
template <class T>
void backward_weight(const Call& call, T* dw, const T* const* x, const T* const* dy, int n_terms) {
  const Conv2d& s = *std::get_if<Conv2d>(&call.layer);
  const int64_t N = call.step.examples, ld = padded_cols<T>(s.F);
  if (takes_winograd(s)) return winograd_backward_weight(s, N, call.scratch, dw, x, dy, n_terms);
  Scratch scratch(call.scratch);
  Work<T> work(scratch, s, N, ConvKind::weight);
  const Padded p = padded_input(s);
  const int64_t chunk = chunk_images<T>(p, N), image = s.H * s.W * s.C, pixels = s.OH * s.OW;
  window_starts<T>(work.a_at, s, p, chunk);
  bool first = true;
  for (int64_t n = 0; n < N; n += chunk) {
    const int64_t count = N - n < chunk ? N - n : chunk;
    for (int i = 0; i < n_terms; ++i) pad_images(work.image[i], x[i] + n * image, count, p);
    for (int64_t from = 0; from < count * pixels; from += kBlockPixels) {
      const int64_t block = count * pixels - from < kBlockPixels ? count * pixels - from : kBlockPixels;
      OuterTerm<T> terms[2];
      for (int i = 0; i < n_terms; ++i) {
        const T* rows = dy[i] + (n * pixels + from) * s.F;
        if (ld != s.F) {
          pad_rows(work.rows[i], rows, block, s.F, ld);
          rows = work.rows[i];
        }
        terms[i] = {work.image[i], rows};
      }
      for (int64_t kh = 0; kh < s.KH; ++kh) {
        OuterTerm<T> row[2];
        for (int i = 0; i < n_terms; ++i) row[i] = {terms[i].a + kh * p.WP * s.C, terms[i].b};
        outer_product(dw + kh * s.KW * s.C * s.F, s.KW * s.C, s.F, row, n_terms, work.a_at + from, ld, block, OuterEnd<T>{first});
      }
      first = false;
    }
  }
}

// db [F] = sum over pixels of dy
template <class T>
void bias_gradient(const Call& call, T* db, const T* dy) {
  if (!db) return;
  const Conv2d& s = *std::get_if<Conv2d>(&call.layer);
  double* sums = Scratch(call.scratch).take<double>(s.F);
  column_sums<T, 1>(call.step.examples * s.OH * s.OW, s.F, sums,
                    [&](auto lane, int64_t r, int64_t f, auto* sum) { sum[0] = load<decltype(lane)>(dy + r * s.F + f); });
  for (int64_t f = 0; f < s.F; ++f) db[f] = T(sums[f]);
}

template <class T>
void conv2d_bwd_weight(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    const T *x = at<T>(call, 2, t), *dy = at<T>(call, 3, t);
    backward_weight<T>(call, at<T>(call, 0, t), &x, &dy, 1);
    bias_gradient<T>(call, at<T>(call, 1, t), dy);
  }
}

template <class T>
void conv2d_bwd_weight_jvp(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    const T* x[2] = {at<T>(call, 2, t), at<T>(call, 3, t)};
    const T* dy[2] = {at<T>(call, 5, t), at<T>(call, 4, t)};
    backward_weight<T>(call, at<T>(call, 0, t), x, dy, x[1] ? 2 : 1);
    bias_gradient<T>(call, at<T>(call, 1, t), dy[0]);
  }
}

}  // namespace

template <class T>
void add_conv2d_ops(OpTable& table) {
  constexpr ConvKind forward = ConvKind::forward, data = ConvKind::data, weight = ConvKind::weight;
  set_op(table, Op::conv2d_fwd, conv2d_fwd<T>, scratch_bytes<T, forward>);
  set_op(table, Op::conv2d_fwd_jvp, conv2d_fwd_jvp<T>, scratch_bytes<T, forward>);
  set_op(table, Op::conv2d_fwd_dual, conv2d_fwd_dual<T>, scratch_bytes<T, forward>);
  set_op(table, Op::conv2d_bwd_data, conv2d_bwd_data<T>, scratch_bytes<T, data>);
  set_op(table, Op::conv2d_bwd_data_jvp, conv2d_bwd_data_jvp<T>, scratch_bytes<T, data>);
  set_op(table, Op::conv2d_bwd_data_dual, conv2d_bwd_data_dual<T>, scratch_bytes<T, data>);
  set_op(table, Op::conv2d_bwd_weight, conv2d_bwd_weight<T>, scratch_bytes<T, weight>);
  set_op(table, Op::conv2d_bwd_weight_jvp, conv2d_bwd_weight_jvp<T>, scratch_bytes<T, weight>);
}
template void add_conv2d_ops<float>(OpTable&);
template void add_conv2d_ops<double>(OpTable&);

FASTMAML_CPU_END
