#include "program/param_layout.h"

#include <algorithm>
#include <cstring>

namespace fastmaml {
namespace {

// Four rows of four numbers become four columns.
template <class T>
inline __attribute__((always_inline)) void transpose(T* const to[4], const T* const from[4]) {
  typedef T Row __attribute__((vector_size(4 * sizeof(T))));
  Row a, b, c, d;
  std::memcpy(&a, from[0], sizeof a);
  std::memcpy(&b, from[1], sizeof b);
  std::memcpy(&c, from[2], sizeof c);
  std::memcpy(&d, from[3], sizeof d);
  const Row ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Row cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
  std::memcpy(to[0], &a, sizeof a);
  std::memcpy(to[1], &b, sizeof b);
  std::memcpy(to[2], &c, sizeof c);
  std::memcpy(to[3], &d, sizeof d);
}

// torch [first, rest] <-> engine [rest, first]; number r of `rest` is row(r) of the engine. By squares, where they fit.
template <class T, bool kFromTorch, class Row>
void move_matrix(int64_t first, int64_t rest, T* to, const T* from, const Row& row) {
  constexpr int64_t kSide = 4;
  const auto one_by_one = [&](int64_t r, int64_t f) {
    const int64_t engine = row(r) * first + f, torch = f * rest + r;
    kFromTorch ? to[engine] = from[torch] : to[torch] = from[engine];
  };
  const int64_t squares = first / kSide * kSide;
  int64_t r = 0;
  for (; r + kSide <= rest; r += kSide) {
    const int64_t engine[kSide] = {row(r) * first, row(r + 1) * first, row(r + 2) * first, row(r + 3) * first};
    for (int64_t f = 0; f < squares; f += kSide) {
      const int64_t torch = f * rest + r;
      if constexpr (kFromTorch) {
        T* const rows[] = {to + engine[0] + f, to + engine[1] + f, to + engine[2] + f, to + engine[3] + f};
        const T* const columns[] = {from + torch, from + torch + rest, from + torch + 2 * rest, from + torch + 3 * rest};
        transpose(rows, columns);
      } else {
        T* const columns[] = {to + torch, to + torch + rest, to + torch + 2 * rest, to + torch + 3 * rest};
        const T* const rows[] = {from + engine[0] + f, from + engine[1] + f, from + engine[2] + f, from + engine[3] + f};
        transpose(columns, rows);
      }
    }
    for (int64_t i = r; i < r + kSide; ++i)
      for (int64_t f = squares; f < first; ++f) one_by_one(i, f);
  }
  for (; r < rest; ++r)
    for (int64_t f = 0; f < first; ++f) one_by_one(r, f);
}

template <class T, bool kFromTorch>
void move_tensor(const Param& p, T* to, const T* from) {
  switch (p.order) {
    case Param::Order::torch:
      std::copy(from, from + p.size, to);
      return;
    case Param::Order::linear:
    case Param::Order::image:  // first dimension last
      move_matrix<T, kFromTorch>(p.dims[0], p.size / p.dims[0], to, from, [](int64_t r) { return r; });
      return;
    case Param::Order::conv2d: {
      const int64_t C = p.dims[1], taps = p.dims[2] * p.dims[3];
      move_matrix<T, kFromTorch>(p.dims[0], C * taps, to, from, [=](int64_t r) { return r % taps * C + r / taps; });
      return;
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
