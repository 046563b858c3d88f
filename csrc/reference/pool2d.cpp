// Pooling over windows of [KH, KW].   x [N, H, W, C]   y [N, OH, OW, C]
// index [N, OH, OW, C] is the window's tap kh * KW + kw. It always points at a pixel of the image, never at the padding.
#include <algorithm>
#include <cmath>
#include <limits>

#include "reference/windows.h"

namespace fastmaml::reference {

namespace {

// The mean's divisor: the taps in the image, or with count_include_pad the taps in the padded image.
double divisor(const Pool2d& shape, int64_t oh, int64_t ow) {
  auto taps = [&](int64_t start, int64_t kernel, int64_t size, int64_t pad) {
    const int64_t end = std::min(start + kernel, size + pad);
    return shape.count_include_pad ? end - start : std::min(end, size) - std::max<int64_t>(start, 0);
  };
  return static_cast<double>(taps(oh * shape.stride_h - shape.pad_h, shape.KH, shape.H, shape.pad_h) *
                             taps(ow * shape.stride_w - shape.pad_w, shape.KW, shape.W, shape.pad_w));
}

}  // namespace

// y = the largest x of the window. Torch's rules: the first in scan order wins a tie, NaN beats every number.
void max_pool2d_fwd(const Call& call) {
  const Pool2d& shape = call.shape<Pool2d>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), x = real(call, 2, task);
    const Index index = elements<int32_t>(call[1], task);
    for_each_window(call.step.examples, shape, [&](int64_t out, int64_t, int64_t, auto x_of) {
      double largest = -std::numeric_limits<double>::infinity();
      int64_t tap = -1;
      for (int64_t kh = 0; kh < shape.KH; ++kh)
        for (int64_t kw = 0; kw < shape.KW; ++kw) {
          const int64_t in = x_of(kh, kw);
          if (in < 0) continue;
          if (tap < 0 || x[in] > largest || std::isnan(x[in])) {
            largest = x[in];
            tap = kh * shape.KW + kw;
          }
        }
      y[out] = largest;
      index[out] = static_cast<int32_t>(tap);
    });
  }
}

// y' = x'[index]
void max_pool2d_fwd_jvp(const Call& call) {
  const Pool2d& shape = call.shape<Pool2d>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y_dot = real(call, 0, task), x_dot = real(call, 1, task);
    const Index index = elements<int32_t>(call[2], task);
    for_each_window(call.step.examples, shape, [&](int64_t out, int64_t, int64_t, auto x_of) {
      y_dot[out] = x_dot[x_of(index[out] / shape.KW, index[out] % shape.KW)];
    });
  }
}

// dx[index] += dy. Overlapping windows add up.
void max_pool2d_bwd(const Call& call) {
  const Pool2d& shape = call.shape<Pool2d>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx = real(call, 0, task), dy = real(call, 1, task);
    const Index index = elements<int32_t>(call[2], task);
    fill(dx, call.step.examples * shape.H * shape.W * shape.C, 0.0);
    for_each_window(call.step.examples, shape,
                    [&](int64_t out, int64_t, int64_t, auto x_of) { dx[x_of(index[out] / shape.KW, index[out] % shape.KW)] += dy[out]; });
  }
}

// y = sum of the window's x / divisor
void avg_pool2d_fwd(const Call& call) {
  const Pool2d& shape = call.shape<Pool2d>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), x = real(call, 1, task);
    for_each_window(call.step.examples, shape, [&](int64_t out, int64_t oh, int64_t ow, auto x_of) {
      double sum = 0;
      for (int64_t kh = 0; kh < shape.KH; ++kh)
        for (int64_t kw = 0; kw < shape.KW; ++kw)
          if (x_of(kh, kw) >= 0) sum += x[x_of(kh, kw)];
      y[out] = sum / divisor(shape, oh, ow);
    });
  }
}

// dx[every tap] += dy / divisor
void avg_pool2d_bwd(const Call& call) {
  const Pool2d& shape = call.shape<Pool2d>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx = real(call, 0, task), dy = real(call, 1, task);
    fill(dx, call.step.examples * shape.H * shape.W * shape.C, 0.0);
    for_each_window(call.step.examples, shape, [&](int64_t out, int64_t oh, int64_t ow, auto x_of) {
      for (int64_t kh = 0; kh < shape.KH; ++kh)
        for (int64_t kw = 0; kw < shape.KW; ++kw)
          if (x_of(kh, kw) >= 0) dx[x_of(kh, kw)] += dy[out] / divisor(shape, oh, ow);
    });
  }
}

}  // namespace fastmaml::reference
