// conv2d (torch's cross-correlation), zero padding.   x [N, H, W, C]   w [KH, KW, C, F]   b [F]   y [N, OH, OW, F]
// Output pixel (oh, ow) meets input pixel (oh stride_h + kh - pad_h, ow stride_w + kw - pad_w) through tap (kh, kw).
#include "reference/reference.h"

namespace fastmaml::reference {

namespace {

// Calls body(y, x, w) for every pair of pixels that meet. The arguments are the offsets of y[n, oh, ow, 0], x[n, h, w,
// 0], w[kh, kw, 0, 0].
template <class Body>
void for_each_tap(int64_t N, const Conv2d& shape, Body body) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t oh = 0; oh < shape.OH; ++oh)
      for (int64_t ow = 0; ow < shape.OW; ++ow)
        for (int64_t kh = 0; kh < shape.KH; ++kh)
          for (int64_t kw = 0; kw < shape.KW; ++kw) {
            const int64_t h = oh * shape.stride_h + kh - shape.pad_h, w = ow * shape.stride_w + kw - shape.pad_w;
            if (h < 0 || h >= shape.H || w < 0 || w >= shape.W) continue;
            body(((n * shape.OH + oh) * shape.OW + ow) * shape.F, ((n * shape.H + h) * shape.W + w) * shape.C,
                 (kh * shape.KW + kw) * shape.C * shape.F);
          }
}

// y = b in every pixel
void set_pixels(Real y, Real b, int64_t N, const Conv2d& shape) {
  for (int64_t pixel = 0; pixel < N * shape.OH * shape.OW; ++pixel)
    for (int64_t f = 0; f < shape.F; ++f) y[pixel * shape.F + f] = value_or(b, f, 0.0);
}

// y += x * w
void add_convolution(Real y, Real x, Real w, int64_t N, const Conv2d& shape) {
  for_each_tap(N, shape, [&](int64_t y0, int64_t x0, int64_t w0) {
    for (int64_t c = 0; c < shape.C; ++c)
      for (int64_t f = 0; f < shape.F; ++f) y[y0 + f] += x[x0 + c] * w[w0 + c * shape.F + f];
  });
}

// dx += convT(dy, w)
void add_data_gradient(Real dx, Real dy, Real w, int64_t N, const Conv2d& shape) {
  for_each_tap(N, shape, [&](int64_t y0, int64_t x0, int64_t w0) {
    for (int64_t c = 0; c < shape.C; ++c)
      for (int64_t f = 0; f < shape.F; ++f) dx[x0 + c] += dy[y0 + f] * w[w0 + c * shape.F + f];
  });
}

// dw += corr(x, dy)
void add_weight_gradient(Real dw, Real x, Real dy, int64_t N, const Conv2d& shape) {
  for_each_tap(N, shape, [&](int64_t y0, int64_t x0, int64_t w0) {
    for (int64_t c = 0; c < shape.C; ++c)
      for (int64_t f = 0; f < shape.F; ++f) dw[w0 + c * shape.F + f] += x[x0 + c] * dy[y0 + f];
  });
}

// db = sum over n, oh, ow of dy
void bias_gradient(Real db, Real dy, int64_t N, const Conv2d& shape) {
  fill(db, shape.F, 0.0);
  for (int64_t pixel = 0; pixel < N * shape.OH * shape.OW; ++pixel)
    for (int64_t f = 0; f < shape.F; ++f) db[f] += dy[pixel * shape.F + f];
}

}  // namespace

// y = x * w + b
void conv2d_fwd(const Call& call) {
  const Conv2d& shape = call.shape<Conv2d>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), x = real(call, 1, task), w = real(call, 2, task), b = real(call, 3, task);
    set_pixels(y, b, N, shape);
    add_convolution(y, x, w, N, shape);
    if (shape.y.on) rectify(y, y, N * shape.OH * shape.OW * shape.F, shape.y.slope);
  }
}

// y' = x' * w + x * w' + b'
void conv2d_fwd_jvp(const Call& call) {
  const Conv2d& shape = call.shape<Conv2d>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y_dot = real(call, 0, task), x = real(call, 1, task), x_dot = real(call, 2, task);
    const Real w = real(call, 3, task), w_dot = real(call, 4, task), b_dot = real(call, 5, task), y = real(call, 6, task);
    set_pixels(y_dot, b_dot, N, shape);
    if (x_dot) add_convolution(y_dot, x_dot, w, N, shape);
    add_convolution(y_dot, x, w_dot, N, shape);
    if (y) rectify(y_dot, y, N * shape.OH * shape.OW * shape.F, shape.y.slope);
  }
}

void conv2d_fwd_dual(const Call& call) {
  const View fwd[] = {call[0], call[2], call[4], call[6]};
  const View y = call.shape<Conv2d>().y.on ? call[0] : View{};
  const View jvp[] = {call[1], call[2], call[3], call[4], call[5], call[7], y};
  conv2d_fwd(with_operands(call, fwd));
  conv2d_fwd_jvp(with_operands(call, jvp));
}

// dx = convT(dy, w)
void conv2d_bwd_data(const Call& call) {
  const Conv2d& shape = call.shape<Conv2d>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx = real(call, 0, task), dy = real(call, 1, task), w = real(call, 2, task), x = real(call, 3, task);
    fill(dx, N * shape.H * shape.W * shape.C, 0.0);
    add_data_gradient(dx, dy, w, N, shape);
    if (x) rectify(dx, x, N * shape.H * shape.W * shape.C, shape.x.slope);
  }
}

// dx' = convT(dy', w) + convT(dy, w')
void conv2d_bwd_data_jvp(const Call& call) {
  const Conv2d& shape = call.shape<Conv2d>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx_dot = real(call, 0, task), dy = real(call, 1, task), dy_dot = real(call, 2, task);
    const Real w = real(call, 3, task), w_dot = real(call, 4, task), x = real(call, 5, task);
    fill(dx_dot, N * shape.H * shape.W * shape.C, 0.0);
    add_data_gradient(dx_dot, dy_dot, w, N, shape);
    add_data_gradient(dx_dot, dy, w_dot, N, shape);
    if (x) rectify(dx_dot, x, N * shape.H * shape.W * shape.C, shape.x.slope);
  }
}

void conv2d_bwd_data_dual(const Call& call) {
  const View bwd[] = {call[0], call[2], call[4], call[6]};
  const View jvp[] = {call[1], call[2], call[3], call[4], call[5], call[6]};
  conv2d_bwd_data(with_operands(call, bwd));
  conv2d_bwd_data_jvp(with_operands(call, jvp));
}

// dw = corr(x, dy);   db = sum over n, oh, ow of dy
void conv2d_bwd_weight(const Call& call) {
  const Conv2d& shape = call.shape<Conv2d>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dw = real(call, 0, task), db = real(call, 1, task), x = real(call, 2, task), dy = real(call, 3, task);
    fill(dw, shape.KH * shape.KW * shape.C * shape.F, 0.0);
    add_weight_gradient(dw, x, dy, N, shape);
    if (db) bias_gradient(db, dy, N, shape);
  }
}

// dw' = corr(x', dy) + corr(x, dy');   db' = sum over n, oh, ow of dy'
void conv2d_bwd_weight_jvp(const Call& call) {
  const Conv2d& shape = call.shape<Conv2d>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dw_dot = real(call, 0, task), db_dot = real(call, 1, task);
    const Real x = real(call, 2, task), x_dot = real(call, 3, task);
    const Real dy = real(call, 4, task), dy_dot = real(call, 5, task);
    fill(dw_dot, shape.KH * shape.KW * shape.C * shape.F, 0.0);
    if (x_dot) add_weight_gradient(dw_dot, x_dot, dy, N, shape);
    add_weight_gradient(dw_dot, x, dy_dot, N, shape);
    if (db_dot) bias_gradient(db_dot, dy_dot, N, shape);
  }
}

}  // namespace fastmaml::reference
