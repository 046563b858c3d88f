// Losses: loss = sum over examples of w_i l_i (one number for each task), and its gradient by the network's output z.
// z [N, size]   labels [N] or target [N, size]   weights [N], absent: 1/N.     dz absent: only the loss is computed.
#include <algorithm>
#include <cmath>
#include <vector>

#include "reference/reference.h"

namespace fastmaml::reference {

namespace {

struct Softmax {
  std::vector<double> p;  // probabilities
  double log_sum_exp;     // shifted by the largest z, so that exp cannot overflow
};

Softmax softmax(Real z, int64_t first, int64_t classes) {
  double largest = z[first], sum = 0;
  for (int64_t c = 1; c < classes; ++c) largest = std::max(largest, z[first + c]);
  Softmax result{std::vector<double>(classes), 0};
  for (int64_t c = 0; c < classes; ++c) sum += result.p[c] = std::exp(z[first + c] - largest);
  for (double& p : result.p) p /= sum;
  result.log_sum_exp = largest + std::log(sum);
  return result;
}

}  // namespace

// l_i = -sum_c t_c log softmax(z)_c  with  t = (1 - e) onehot + e / classes;     dz_i = w_i (softmax(z) - t)
void cross_entropy(const Call& call) {
  const Loss& shape = call.shape<Loss>();
  const int64_t N = call.step.examples, classes = shape.size;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real loss = real(call, 0, task), dz = real(call, 1, task), z = real(call, 2, task), weights = real(call, 4, task);
    const Label labels = elements<int64_t>(call[3], task);
    loss[0] = 0;
    for (int64_t n = 0; n < N; ++n) {
      const double weight = value_or(weights, n, 1.0 / static_cast<double>(N));
      const Softmax s = softmax(z, n * classes, classes);
      double example_loss = 0;
      for (int64_t c = 0; c < classes; ++c) {
        const double target = (c == labels[n] ? 1 - shape.smoothing : 0) + shape.smoothing / static_cast<double>(classes);
        // A class with target 0 adds nothing, even if its log-probability is -inf.
        if (target != 0) example_loss += target * (s.log_sum_exp - z[n * classes + c]);
        if (dz) dz[n * classes + c] = weight * (s.p[c] - target);
      }
      loss[0] += weight * example_loss;
    }
  }
}

// dz' = w p (z' - <p, z'>)
void cross_entropy_jvp(const Call& call) {
  const Loss& shape = call.shape<Loss>();
  const int64_t N = call.step.examples, classes = shape.size;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dz_dot = real(call, 0, task), z = real(call, 1, task), z_dot = real(call, 2, task), weights = real(call, 4, task);
    for (int64_t n = 0; n < N; ++n) {
      const double weight = value_or(weights, n, 1.0 / static_cast<double>(N));
      const Softmax s = softmax(z, n * classes, classes);
      double mean = 0;
      for (int64_t c = 0; c < classes; ++c) mean += s.p[c] * z_dot[n * classes + c];
      for (int64_t c = 0; c < classes; ++c) dz_dot[n * classes + c] = weight * s.p[c] * (z_dot[n * classes + c] - mean);
    }
  }
}

// l_i = mean over the outputs of (z - t)^2;     dz_i = w_i 2 (z - t) / size
void mse(const Call& call) {
  const Loss& shape = call.shape<Loss>();
  const int64_t N = call.step.examples;
  const double size = static_cast<double>(shape.size);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real loss = real(call, 0, task), dz = real(call, 1, task), z = real(call, 2, task);
    const Real target = real(call, 3, task), weights = real(call, 4, task);
    loss[0] = 0;
    for (int64_t n = 0; n < N; ++n) {
      const double weight = value_or(weights, n, 1.0 / static_cast<double>(N));
      double sum = 0;
      for (int64_t i = n * shape.size; i < (n + 1) * shape.size; ++i) {
        const double error = z[i] - target[i];
        sum += error * error;
        if (dz) dz[i] = weight * 2 * error / size;
      }
      loss[0] += weight * sum / size;
    }
  }
}

// dz' = w 2 z' / size
void mse_jvp(const Call& call) {
  const Loss& shape = call.shape<Loss>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dz_dot = real(call, 0, task), z_dot = real(call, 2, task), weights = real(call, 4, task);
    for (int64_t n = 0; n < N; ++n) {
      const double weight = value_or(weights, n, 1.0 / static_cast<double>(N));
      for (int64_t i = n * shape.size; i < (n + 1) * shape.size; ++i) dz_dot[i] = weight * 2 * z_dot[i] / static_cast<double>(shape.size);
    }
  }
}

}  // namespace fastmaml::reference
