// Pooling over windows of [KH, KW].   x [N, H, W, C]   y [N, OH, OW, C]   index [N, OH, OW, C]: the tap kh * KW + kw that won.
// A thread has a chunk of channels of one pixel. Backward gathers: a pixel of dx adds up the windows that contain the pixel, row by row.
#pragma once

#include "cuda/kernels/operands.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

struct PoolSizes {  // layers.h's Pool2d
  int N, C, H, W, OH, OW, KH, KW, stride_h, stride_w, pad_h, pad_w;
  bool count_include_pad;
};

// One pixel of [N, height, width, C], and the thread's channels.
template <class T>
struct PoolThread {
  int n, h, w, c, count;

  __device__ PoolThread(int pixel, int height, int width, int c, int count)
      : n(pixel / width / height), h(pixel / width % height), w(pixel % width), c(c), count(count) {}
  __device__ PoolThread(int place, int height, int width, int C)
      : PoolThread(place / chunks(C), height, width, place % chunks(C) * kChunk<T>, min(C - place % chunks(C) * kChunk<T>, kChunk<T>)) {}
  __device__ static int chunks(int C) { return (C + kChunk<T> - 1) / kChunk<T>; }
  __device__ int at(int h, int w, int height, int width, int C) const { return ((n * height + h) * width + w) * C + c; }
};

// F has  template <bool kWide> void run(int64_t task, int place) const,  and places(), the number of places.
template <class F>
__global__ void map_places(F f, int places, bool wide) {
  for (int64_t place = int64_t(blockIdx.y) * blockDim.x + threadIdx.x; place < places; place += int64_t(gridDim.y) * blockDim.x) {
    if (wide)
      f.template run<true>(blockIdx.x, int(place));
    else
      f.template run<false>(blockIdx.x, int(place));
  }
}

// Calls body(tap, offset in x) for the taps of window (oh, ow) inside the image.
template <class T, class Body>
__device__ __forceinline__ void for_taps(const PoolSizes& s, const PoolThread<T>& t, Body body) {
  const int h0 = t.h * s.stride_h - s.pad_h, w0 = t.w * s.stride_w - s.pad_w;
  for (int kh = 0; kh < s.KH; ++kh)
    for (int kw = 0; kw < s.KW; ++kw) {
      const int h = h0 + kh, w = w0 + kw;
      if (h >= 0 && h < s.H && w >= 0 && w < s.W) body(kh * s.KW + kw, t.at(h, w, s.H, s.W, s.C));
    }
}

// Calls body(tap, oh, ow) for the windows that contain pixel (h, w), with the pixel's tap.
template <class T, class Body>
__device__ __forceinline__ void for_windows(const PoolSizes& s, const PoolThread<T>& t, Body body) {
  const int h = t.h + s.pad_h, w = t.w + s.pad_w;
  const int first_oh = h < s.KH ? 0 : (h - s.KH) / s.stride_h + 1, first_ow = w < s.KW ? 0 : (w - s.KW) / s.stride_w + 1;
  for (int oh = first_oh; oh < s.OH && oh * s.stride_h <= h; ++oh)
    for (int ow = first_ow; ow < s.OW && ow * s.stride_w <= w; ++ow) body((h - oh * s.stride_h) * s.KW + w - ow * s.stride_w, oh, ow);
}

// ---------------------------------------------------------------- max

// y = the largest x of the window. Torch's rules: the first in scan order wins a tie, NaN beats every number.
template <class T>
struct MaxPool2dFwd {
  PerTask<T> y;
  PerTask<int> index;
  PerTask<const T> x;
  PoolSizes s;

  template <bool kWide>
  __device__ void run(int64_t task, int place) const {
    const PoolThread<T> t(place, s.OH, s.OW, s.C);
    const T* const from = x.of(task);
    Chunk<T> best = {};
    Chunk<int, kChunk<T>> winner;
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) winner.at[j] = -1;
    for_taps(s, t, [&](int tap, int i) {
      const Chunk<T> v = load<kWide, kChunk<T>>(from + i, t.count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j)
        if (winner.at[j] < 0 || v.at[j] > best.at[j] || v.at[j] != v.at[j]) {
          best.at[j] = v.at[j];
          winner.at[j] = tap;
        }
    });
    const int to = t.at(t.h, t.w, s.OH, s.OW, s.C);
    store<kWide>(y.of(task) + to, best, t.count);
    store<kWide>(index.of(task) + to, winner, t.count);
  }
};

// y' = x'[index]
template <class T>
struct MaxPool2dFwdJvp {
  PerTask<T> y_dot;
  PerTask<const T> x_dot;
  PerTask<const int> index;
  PoolSizes s;

  template <bool kWide>
  __device__ void run(int64_t task, int place) const {
    const PoolThread<T> t(place, s.OH, s.OW, s.C);
    const int to = t.at(t.h, t.w, s.OH, s.OW, s.C), h0 = t.h * s.stride_h - s.pad_h, w0 = t.w * s.stride_w - s.pad_w;
    const Chunk<int, kChunk<T>> winner = load<kWide, kChunk<T>>(index.of(task) + to, t.count);
    Chunk<T> out;
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j)
      if (j < t.count) out.at[j] = x_dot.of(task)[t.at(h0 + winner.at[j] / s.KW, w0 + winner.at[j] % s.KW, s.H, s.W, s.C) + j];
    store<kWide>(y_dot.of(task) + to, out, t.count);
  }
};

// dx[index] += dy
template <class T>
struct MaxPool2dBwd {
  PerTask<T> dx;
  PerTask<const T> dy;
  PerTask<const int> index;
  PoolSizes s;

  template <bool kWide>
  __device__ void run(int64_t task, int place) const {
    const PoolThread<T> t(place, s.H, s.W, s.C);
    Chunk<T> sum = {};
    for_windows(s, t, [&](int tap, int oh, int ow) {
      const int from = t.at(oh, ow, s.OH, s.OW, s.C);
      const Chunk<int, kChunk<T>> winner = load<kWide, kChunk<T>>(index.of(task) + from, t.count);
      const Chunk<T> d = load<kWide, kChunk<T>>(dy.of(task) + from, t.count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j)
        if (winner.at[j] == tap) sum.at[j] += d.at[j];
    });
    store<kWide>(dx.of(task) + t.at(t.h, t.w, s.H, s.W, s.C), sum, t.count);
  }
};

// dx[index] += dy for adjacent windows (stride = kernel, no padding): a thread reads its window once and writes all its pixels.
// Windows past the last one cover the rest of the image and write zeros.
template <class T>
struct MaxPool2dBwdTiles {
  PerTask<T> dx;
  PerTask<const T> dy;
  PerTask<const int> index;
  PoolSizes s;

  template <bool kWide>
  __device__ void run(int64_t task, int place) const {
    const PoolThread<T> t(place, (s.H + s.KH - 1) / s.KH, (s.W + s.KW - 1) / s.KW, s.C);
    Chunk<int, kChunk<T>> winner;
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) winner.at[j] = -1;
    Chunk<T> d = {};
    if (t.h < s.OH && t.w < s.OW) {
      const int from = t.at(t.h, t.w, s.OH, s.OW, s.C);
      winner = load<kWide, kChunk<T>>(index.of(task) + from, t.count);
      d = load<kWide, kChunk<T>>(dy.of(task) + from, t.count);
    }
    for_taps(s, t, [&](int tap, int i) {
      Chunk<T> share;
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) share.at[j] = winner.at[j] == tap ? d.at[j] : T(0);
      store<kWide>(dx.of(task) + i, share, t.count);
    });
  }
};

// ---------------------------------------------------------------- average

// 1 / the taps of a window that count: the taps in the image, or with count_include_pad those in the padded image.
template <class T>
__device__ __forceinline__ T window_share(const PoolSizes& s, int oh, int ow) {
  const auto taps = [&](int start, int kernel, int size, int pad) {
    const int end = min(start + kernel, size + pad);
    return s.count_include_pad ? end - start : min(end, size) - max(start, 0);
  };
  return T(1) / T(taps(oh * s.stride_h - s.pad_h, s.KH, s.H, s.pad_h) * taps(ow * s.stride_w - s.pad_w, s.KW, s.W, s.pad_w));
}

// y = the window's mean
template <class T>
struct AvgPool2dFwd {
  PerTask<T> y;
  PerTask<const T> x;
  PoolSizes s;

  template <bool kWide>
  __device__ void run(int64_t task, int place) const {
    const PoolThread<T> t(place, s.OH, s.OW, s.C);
    Chunk<T> sum = {};
    for_taps(s, t, [&](int, int i) {
      const Chunk<T> v = load<kWide, kChunk<T>>(x.of(task) + i, t.count);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) sum.at[j] += v.at[j];
    });
    const T share = window_share<T>(s, t.h, t.w);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) sum.at[j] *= share;
    store<kWide>(y.of(task) + t.at(t.h, t.w, s.OH, s.OW, s.C), sum, t.count);
  }
};

// dx = the sum of dy / taps over the windows
template <class T>
struct AvgPool2dBwd {
  PerTask<T> dx;
  PerTask<const T> dy;
  PoolSizes s;

  template <bool kWide>
  __device__ void run(int64_t task, int place) const {
    const PoolThread<T> t(place, s.H, s.W, s.C);
    Chunk<T> sum = {};
    for_windows(s, t, [&](int, int oh, int ow) {
      const Chunk<T> d = load<kWide, kChunk<T>>(dy.of(task) + t.at(oh, ow, s.OH, s.OW, s.C), t.count);
      const T share = window_share<T>(s, oh, ow);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) sum.at[j] += d.at[j] * share;
    });
    store<kWide>(dx.of(task) + t.at(t.h, t.w, s.H, s.W, s.C), sum, t.count);
  }
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
