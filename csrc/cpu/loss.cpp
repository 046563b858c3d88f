// Losses: a weighted sum over examples (weight 1/N by default) and its gradient by the output; ALGORITHMS section 6.
// Sums run in double. They cost little, and every backward pass starts from the loss's gradient.
#include <cmath>

#include "cpu/cpu.h"

FASTMAML_CPU_BEGIN
namespace {

template <class T>
struct Softmax {
  double largest, total;
  Softmax(const T* z, int64_t classes) : largest(double(z[0])), total(0) {
    for (int64_t c = 1; c < classes; ++c) largest = double(z[c]) > largest ? double(z[c]) : largest;
    for (int64_t c = 0; c < classes; ++c) total += std::exp(double(z[c]) - largest);
  }
  double p(T z) const { return std::exp(double(z) - largest) / total; }
  double log_p(T z) const { return double(z) - largest - std::log(total); }
};

template <class T>
double weight(const T* weights, int64_t n, int64_t N) {
  return weights ? double(weights[n]) : 1.0 / double(N);
}

// target = (1 - smoothing) onehot + smoothing / classes;  loss = -sum w target log p;  dz = w (p - target)
template <class T>
void cross_entropy(const Call& call) {
  const Loss& s = *std::get_if<Loss>(&call.layer);
  const int64_t N = call.step.examples;
  const double spread = s.smoothing / double(s.size);
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *loss = at<T>(call, 0, t), *dz = at<T>(call, 1, t);
    const T *z = at<T>(call, 2, t), *weights = at<T>(call, 4, t);
    const int64_t* labels = at<int64_t>(call, 3, t);
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) {
      const T* row = z + n * s.size;
      const Softmax<T> softmax(row, s.size);
      const double w = weight(weights, n, N);
      double example = 0;
      for (int64_t c = 0; c < s.size; ++c) {
        const double target = (c == labels[n] ? 1.0 - s.smoothing : 0.0) + spread;
        if (target != 0) example -= target * softmax.log_p(row[c]);
        if (dz) dz[n * s.size + c] = T(w * (softmax.p(row[c]) - target));
      }
      sum += w * example;
    }
    loss[0] = T(sum);
  }
}

// dz_dot = w p (z_dot - <p, z_dot>)
template <class T>
void cross_entropy_jvp(const Call& call) {
  const Loss& s = *std::get_if<Loss>(&call.layer);
  const int64_t N = call.step.examples;
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* dz_dot = at<T>(call, 0, t);
    const T *z = at<T>(call, 1, t), *z_dot = at<T>(call, 2, t), *weights = at<T>(call, 4, t);
    for (int64_t n = 0; n < N; ++n) {
      const T *row = z + n * s.size, *row_dot = z_dot + n * s.size;
      const Softmax<T> softmax(row, s.size);
      double mean = 0;
      for (int64_t c = 0; c < s.size; ++c) mean += softmax.p(row[c]) * double(row_dot[c]);
      const double w = weight(weights, n, N);
      for (int64_t c = 0; c < s.size; ++c) dz_dot[n * s.size + c] = T(w * softmax.p(row[c]) * (double(row_dot[c]) - mean));
    }
  }
}

// Calls f(weight of a number, from, count): once for all examples, or for each example if examples have their own weights.
template <class T, class F>
void for_examples(const T* weights, int64_t N, int64_t size, F f) {
  if (!weights) return f(1.0 / double(N * size), 0, N * size);
  for (int64_t n = 0; n < N; ++n) f(weight(weights, n, N) / double(size), n * size, size);
}

// loss = sum w mean((z - target)^2);  dz = 2 w (z - target) / size
template <class T>
void mse(const Call& call) {
  const Loss& s = *std::get_if<Loss>(&call.layer);
  const int64_t N = call.step.examples;
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *loss = at<T>(call, 0, t), *dz = at<T>(call, 1, t);
    const T *z = at<T>(call, 2, t), *target = at<T>(call, 3, t), *weights = at<T>(call, 4, t);
    double sum = 0;
    for_examples(weights, N, s.size, [&](double w, int64_t from, int64_t count) {
      const T twice = T(2 * w);
      sum += w * block_sum<T>(count, [&](auto lane, int64_t i) {
               using V = decltype(lane);
               const V error = load<V>(z + from + i) - load<V>(target + from + i);
               if (dz) store(dz + from + i, twice * error);
               return error * error;
             });
    });
    loss[0] = T(sum);
  }
}

template <class T>
void mse_jvp(const Call& call) {
  const Loss& s = *std::get_if<Loss>(&call.layer);
  const int64_t N = call.step.examples;
  for (int64_t t = 0; t < call.tasks; ++t) {
    T* dz_dot = at<T>(call, 0, t);
    const T *z_dot = at<T>(call, 2, t), *weights = at<T>(call, 4, t);
    for_examples(weights, N, s.size, [&](double w, int64_t from, int64_t count) {
      const T twice = T(2 * w);
      for_lanes<T>(count, [&](auto lane, int64_t i) { store(dz_dot + from + i, twice * load<decltype(lane)>(z_dot + from + i)); });
    });
  }
}

}  // namespace

template <class T>
void add_loss_ops(OpTable& table) {
  set_op(table, Op::cross_entropy, cross_entropy<T>);
  set_op(table, Op::cross_entropy_jvp, cross_entropy_jvp<T>);
  set_op(table, Op::mse, mse<T>);
  set_op(table, Op::mse_jvp, mse_jvp<T>);
}
template void add_loss_ops<float>(OpTable&);
template void add_loss_ops<double>(OpTable&);

FASTMAML_CPU_END
