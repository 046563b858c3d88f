// Flat vectors: fill_zero, copy, add, axpy; and flatten, which only reorders.
#include "cpu/cpu.h"

FASTMAML_CPU_BEGIN
namespace {

int64_t size_of(const Call& call) { return std::get_if<Vector>(&call.layer)->size; }

template <class T>
void fill_zero(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) std::memset(at<T>(call, 0, t), 0, size_t(size_of(call)) * sizeof(T));
}

template <class T>
void copy(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) std::memcpy(at<T>(call, 0, t), at<T>(call, 1, t), size_t(size_of(call)) * sizeof(T));
}

template <class T>
void add(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* out = at<T>(call, 0, t);
    const T *a = at<T>(call, 1, t), *b = at<T>(call, 2, t);
    for_lanes<T>(size_of(call), [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(out + i, load<V>(a + i) + load<V>(b + i));
    });
  }
}

template <class T>
void axpy(const Call& call) {
  const Axpy& shape = *std::get_if<Axpy>(&call.layer);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* y = at<T>(call, 0, t);
    const T *alpha = at<T>(call, 1, t), *x = at<T>(call, 2, t);
    const T factor = T(shape.factor) * (alpha ? *alpha : T(1));
    for_lanes<T>(shape.size, [&](auto lane, int64_t i) {
      using V = decltype(lane);
      store(y + i, load<V>(y + i) + factor * load<V>(x + i));
    });
  }
}

// [N, H W, C] <-> [N, C, H W]
template <class T, bool kForward>
void flatten(const Call& call) {
  const Flatten& s = *std::get_if<Flatten>(&call.layer);
  const int64_t pixels = s.H * s.W, C = s.C;
  for (int64_t t = 0; t < call.tasks; ++t)
    for (int64_t n = 0; n < call.step.examples; ++n) {
      T* out = at<T>(call, 0, t) + n * pixels * C;
      const T* in = at<T>(call, 1, t) + n * pixels * C;
      for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < C; ++c) {
          if constexpr (kForward)
            out[c * pixels + p] = in[p * C + c];
          else
            out[p * C + c] = in[c * pixels + p];
        }
    }
}

}  // namespace

template <class T>
void add_vector_ops(OpTable& table) {
  set_op(table, Op::fill_zero, fill_zero<T>);
  set_op(table, Op::copy, copy<T>);
  set_op(table, Op::add, add<T>);
  set_op(table, Op::axpy, axpy<T>);
  set_op(table, Op::flatten_fwd, flatten<T, true>);
  set_op(table, Op::flatten_bwd, flatten<T, false>);
}
template void add_vector_ops<float>(OpTable&);
template void add_vector_ops<double>(OpTable&);

FASTMAML_CPU_END
