#include "program/param_layout.h"

#include <algorithm>
#include <cstring>

namespace fastmaml {
namespace {

// 4 x 4 numbers, by rows from `from` and by columns to `to`, or (kBack) the other way round.
template <bool kBack, class T, class Row>
inline __attribute__((always_inline)) void transpose_square(T* to, const T* from, int64_t columns, const Row& row) {
  typedef T V __attribute__((vector_size(4 * sizeof(T))));
  V a[4], b[4], c[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&a[i], kBack ? from + row(i) : from + i * columns, sizeof(V));
  for (int i : {0, 2}) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 4, 1, 5);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 6, 3, 7);
  }
  for (int i : {0, 1}) {
    c[2 * i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 4, 5);
    c[2 * i + 1] = __builtin_shufflevector(b[i], b[i + 2], 2, 3, 6, 7);
  }
  for (int i = 0; i < 4; ++i) std::memcpy(kBack ? to + i * columns : to + row(i), &c[i], sizeof(V));
}

// A matrix [rows, columns] on torch's side, transposed on the engine's, where column j is row place(j). Four rows of what is read are read
// from end to end; what is written is up to kOpen lines at a time, which stay in L1 until they are full.
template <class T, bool kFromTorch, class Place>
void transpose(T* to, const T* from, int64_t rows, int64_t columns, const Place& place) {
  constexpr int64_t kOpen = 128;
  const auto square = [&](int64_t r, int64_t j) {
    const auto row = [&](int64_t i) { return place(j + i) * rows + r; };
    if (r + 4 <= rows && j + 4 <= columns) {
      if constexpr (kFromTorch)
        transpose_square<false>(to, from + r * columns + j, columns, row);
      else
        transpose_square<true>(to + r * columns + j, from, columns, row);
      return;
    }
    for (int64_t i = 0; i < std::min<int64_t>(4, rows - r); ++i)
      for (int64_t k = 0; k < std::min<int64_t>(4, columns - j); ++k) {
        const int64_t torch = (r + i) * columns + j + k, engine = row(k) + i;
        if constexpr (kFromTorch)
          to[engine] = from[torch];
        else
          to[torch] = from[engine];
      }
  };
  const int64_t read = kFromTorch ? rows : columns, written = kFromTorch ? columns : rows;
  for (int64_t begin = 0; begin < written; begin += kOpen)
    for (int64_t i = 0; i < read; i += 4)
      for (int64_t k = begin; k < std::min(written, begin + kOpen); k += 4) kFromTorch ? square(i, k) : square(k, i);
}

template <class T, bool kFromTorch>
void move_tensor(const Param& p, T* to, const T* from) {
  switch (p.order) {
    case Param::Order::torch:
      std::copy(from, from + p.size, to);
      return;
    case Param::Order::linear:
    case Param::Order::image:  // first dimension last
      return transpose<T, kFromTorch>(to, from, p.dims[0], p.size / p.dims[0], [](int64_t j) { return j; });
    case Param::Order::conv2d: {
      const int64_t C = p.dims[1], taps = p.dims[2] * p.dims[3];
      return transpose<T, kFromTorch>(to, from, p.dims[0], C * taps, [=](int64_t j) { return j % taps * C + j / taps; });
    }
  }
}

template <class T, bool kFromTorch>
void move_all(const std::vector<Param>& params, T* to, const T* from, int64_t count) {
  const int64_t size = size_of(params);
  for (int64_t v = 0; v < count; ++v)
    for (const Param& p : params) {
      const int64_t at = v * size + p.offset;
      move_tensor<T, kFromTorch>(p, to + at, from + at);
    }
}

}  // namespace

int64_t size_of(const std::vector<Param>& params) { return params.empty() ? 0 : params.back().offset + params.back().size; }

bool in_torch_order(const std::vector<Param>& params) {
  return std::all_of(params.begin(), params.end(), [](const Param& p) { return p.order == Param::Order::torch; });
}

template <class T>
void params_from_torch(const std::vector<Param>& params, T* to, const T* from, int64_t count) {
  move_all<T, true>(params, to, from, count);
}

template <class T>
void params_to_torch(const std::vector<Param>& params, T* to, const T* from, int64_t count) {
  move_all<T, false>(params, to, from, count);
}

template void params_from_torch(const std::vector<Param>&, float*, const float*, int64_t);
template void params_from_torch(const std::vector<Param>&, double*, const double*, int64_t);
template void params_to_torch(const std::vector<Param>&, float*, const float*, int64_t);
template void params_to_torch(const std::vector<Param>&, double*, const double*, int64_t);
// of places, for devices that gather
template void params_from_torch(const std::vector<Param>&, int32_t*, const int32_t*, int64_t);
template void params_to_torch(const std::vector<Param>&, int32_t*, const int32_t*, int64_t);

}  // namespace fastmaml
