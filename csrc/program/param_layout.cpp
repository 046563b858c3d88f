#include "program/param_layout.h"

#include <algorithm>

namespace fastmaml {
namespace {

// Both orders as a walk over rows x cols matrices: torch [outer][rows][cols] <-> engine; see the table in the header.
template <class T, bool kFromTorch>
void move_tensor(const Param& p, T* engine_out, const T* in) {
  auto put = [&](int64_t engine, int64_t torch) {
    if constexpr (kFromTorch)
      engine_out[engine] = in[torch];
    else
      engine_out[torch] = in[engine];
  };
  switch (p.order) {
    case Param::Order::torch:
      std::copy(in, in + p.size, engine_out);
      return;
    case Param::Order::linear:
    case Param::Order::image: {  // first dimension last
      const int64_t first = p.dims[0], rest = p.size / first;
      for (int64_t r = 0; r < rest; ++r)
        for (int64_t f = 0; f < first; ++f) put(r * first + f, f * rest + r);
      return;
    }
    case Param::Order::conv2d: {
      const int64_t F = p.dims[0], C = p.dims[1], taps = p.dims[2] * p.dims[3];
      for (int64_t k = 0; k < taps; ++k)
        for (int64_t c = 0; c < C; ++c)
          for (int64_t f = 0; f < F; ++f) put((k * C + c) * F + f, (f * C + c) * taps + k);
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
