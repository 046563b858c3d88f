// max_pool2d and avg_pool2d on [N, H, W, C]; vectors run over channels.
#include "cpu/cpu.h"
#include "cpu/kernels/pool_windows.h"

FASTMAML_CPU_BEGIN
namespace {

// Calls f(output pixel, the window's first row and column in the input).
template <class F>
inline void for_windows(const Call& call, const Pool2d& s, F f) {
  for (int64_t n = 0; n < call.step.examples; ++n)
    for (int64_t oh = 0; oh < s.OH; ++oh)
      for (int64_t ow = 0; ow < s.OW; ++ow) f(n, (n * s.OH + oh) * s.OW + ow, oh * s.stride_h - s.pad_h, ow * s.stride_w - s.pad_w);
}

// Vectors of T with int32 indices if both have the same width; else single numbers.
template <class T, class F>
inline __attribute__((always_inline)) void for_channels(int64_t C, F f) {
  if constexpr (sizeof(T) == sizeof(int32_t))
    for_lanes<T>(C, f);
  else
    for (int64_t c = 0; c < C; ++c) f(T{}, c);
}
template <class V>
using IndexOf = std::conditional_t<std::is_arithmetic_v<V>, int32_t, Vec<int32_t>>;

template <class T>
void max_pool2d_fwd(const Call& call) {
  const Pool2d& s = *std::get_if<Pool2d>(&call.layer);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* y = at<T>(call, 0, t);
    int32_t* index = at<int32_t>(call, 1, t);
    const T* x = at<T>(call, 2, t);
    for_windows(call, s, [&](int64_t n, int64_t out, int64_t h0, int64_t w0) {
      for_channels<T>(s.C, [&](auto lane, int64_t c) {
        using V = decltype(lane);
        using I = IndexOf<V>;
        V best{};
        I tap{};
        bool first = true;
        for_taps(s, n, h0, w0, [&](int32_t k, int64_t pixel) {
          const V v = load<V>(x + pixel * s.C + c);
          const I here = broadcast<I>(k);
          if (first) {
            best = v;
            tap = here;
            first = false;
          } else {
            const auto wins = (v > best) | (v != v);  // the first maximum stays; NaN wins, as in torch
            tap = wins ? here : tap;
            best = wins ? v : best;
          }
        });
        store(y + out * s.C + c, best);
        store(index + out * s.C + c, tap);
      });
    });
  }
}

template <class T>
void max_pool2d_fwd_jvp(const Call& call) {
  const Pool2d& s = *std::get_if<Pool2d>(&call.layer);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* y_dot = at<T>(call, 0, t);
    const T* x_dot = at<T>(call, 1, t);
    const int32_t* index = at<int32_t>(call, 2, t);
    for_windows(call, s, [&](int64_t n, int64_t out, int64_t h0, int64_t w0) {
      for_channels<T>(s.C, [&](auto lane, int64_t c) {
        using V = decltype(lane);
        using I = IndexOf<V>;
        const I tap = load<I>(index + out * s.C + c);
        V chosen{};
        for_taps(s, n, h0, w0,
                 [&](int32_t k, int64_t pixel) { chosen = (tap == broadcast<I>(k)) ? load<V>(x_dot + pixel * s.C + c) : chosen; });
        store(y_dot + out * s.C + c, chosen);
      });
    });
  }
}

template <class T>
void max_pool2d_bwd(const Call& call) {
  const Pool2d& s = *std::get_if<Pool2d>(&call.layer);
  const bool once = tiles(s), covered = once && s.OH * s.KH == s.H && s.OW * s.KW == s.W;
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* dx = at<T>(call, 0, t);
    const T* dy = at<T>(call, 1, t);
    const int32_t* index = at<int32_t>(call, 2, t);
    if (!covered) std::memset(dx, 0, size_t(call.step.examples * s.H * s.W * s.C) * sizeof(T));
    for_windows(call, s, [&](int64_t n, int64_t out, int64_t h0, int64_t w0) {
      for_channels<T>(s.C, [&](auto lane, int64_t c) {
        using V = decltype(lane);
        using I = IndexOf<V>;
        const I tap = load<I>(index + out * s.C + c);
        const V d = load<V>(dy + out * s.C + c), zero{};
        for_taps(s, n, h0, w0, [&](int32_t k, int64_t pixel) {
          T* to = dx + pixel * s.C + c;
          const V share = (tap == broadcast<I>(k)) ? d : zero;
          store(to, once ? share : load<V>(to) + share);
        });
      });
    });
  }
}

template <class T>
T window_share(const Pool2d& s, int64_t h0, int64_t w0) {
  int64_t count = s.KH * s.KW;
  if (!s.count_include_pad) {
    count = 0;
    for_taps(s, 0, h0, w0, [&](int32_t, int64_t) { ++count; });
  }
  return T(1.0 / double(count));
}

template <class T>
void avg_pool2d_fwd(const Call& call) {
  const Pool2d& s = *std::get_if<Pool2d>(&call.layer);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* y = at<T>(call, 0, t);
    const T* x = at<T>(call, 1, t);
    for_windows(call, s, [&](int64_t n, int64_t out, int64_t h0, int64_t w0) {
      const T share = window_share<T>(s, h0, w0);
      for_lanes<T>(s.C, [&](auto lane, int64_t c) {
        using V = decltype(lane);
        V sum{};
        for_taps(s, n, h0, w0, [&](int32_t, int64_t pixel) { sum += load<V>(x + pixel * s.C + c); });
        store(y + out * s.C + c, sum * share);
      });
    });
  }
}

template <class T>
void avg_pool2d_bwd(const Call& call) {
  const Pool2d& s = *std::get_if<Pool2d>(&call.layer);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* dx = at<T>(call, 0, t);
    const T* dy = at<T>(call, 1, t);
    std::memset(dx, 0, size_t(call.step.examples * s.H * s.W * s.C) * sizeof(T));
    for_windows(call, s, [&](int64_t n, int64_t out, int64_t h0, int64_t w0) {
      const T share = window_share<T>(s, h0, w0);
      for_lanes<T>(s.C, [&](auto lane, int64_t c) {
        using V = decltype(lane);
        const V d = load<V>(dy + out * s.C + c) * share;
        for_taps(s, n, h0, w0, [&](int32_t, int64_t pixel) {
          T* to = dx + pixel * s.C + c;
          store(to, load<V>(to) + d);
        });
      });
    });
  }
}

}  // namespace

template <class T>
void add_pool2d_ops(OpTable& table) {
  set_op(table, Op::max_pool2d_fwd, max_pool2d_fwd<T>);
  set_op(table, Op::max_pool2d_fwd_jvp, max_pool2d_fwd_jvp<T>);
  set_op(table, Op::max_pool2d_bwd, max_pool2d_bwd<T>);
  set_op(table, Op::avg_pool2d_fwd, avg_pool2d_fwd<T>);
  set_op(table, Op::avg_pool2d_bwd, avg_pool2d_bwd<T>);
}
template void add_pool2d_ops<float>(OpTable&);
template void add_pool2d_ops<double>(OpTable&);

FASTMAML_CPU_END
