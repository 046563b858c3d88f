// Losses: a weighted sum over examples (weight 1/N where none are given) and its gradient by the output; ALGORITHMS section 6.
// Sums run in double: a loss is a handful of numbers, and its gradient starts every backward pass.
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

// loss = sum w mean((z - target)^2);  dz = 2 w (z - target) / size
template <class T>
void mse(const Call& call) {
  const Loss& s = *std::get_if<Loss>(&call.layer);
  const int64_t N = call.step.examples;
  for (int64_t t = 0; t < call.tasks; ++t) {
    T *loss = at<T>(call, 0, t), *dz = at<T>(call, 1, t);
    const T *z = at<T>(call, 2, t), *target = at<T>(call, 3, t), *weights = at<T>(call, 4, t);
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) {
      const double w = weight(weights, n, N) / double(s.size);
      for (int64_t i = n * s.size; i < (n + 1) * s.size; ++i) {
        const double error = double(z[i]) - double(target[i]);
        sum += w * error * error;
        if (dz) dz[i] = T(2 * w * error);
      }
    }
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
    for (int64_t n = 0; n < N; ++n) {
      const double w = 2 * weight(weights, n, N) / double(s.size);
      for (int64_t i = n * s.size; i < (n + 1) * s.size; ++i) dz_dot[i] = T(w * double(z_dot[i]));
    }
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
