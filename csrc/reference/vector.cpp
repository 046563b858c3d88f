// Plain vectors of `size` elements.
#include "reference/reference.h"

namespace fastmaml::reference {

namespace {

int64_t row_size(const Call& call) {
  if (const Add* add = std::get_if<Add>(&call.layer)) return add->size;
  return call.shape<Vector>().size;
}

}  // namespace

// out = 0
void fill_zero(const Call& call) {
  const int64_t size = call.step.examples * row_size(call);
  for (int64_t task = 0; task < call.tasks; ++task) fill(real(call, 0, task), size, 0.0);
}

// out = x
void copy(const Call& call) {
  const int64_t size = call.step.examples * row_size(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real out = real(call, 0, task), x = real(call, 1, task);
    for (int64_t i = 0; i < size; ++i) out[i] = x[i];
  }
}

// out = a + b;  out may be a or b
void add(const Call& call) {
  const int64_t size = call.step.examples * row_size(call);
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real out = real(call, 0, task), a = real(call, 1, task), b = real(call, 2, task);
    for (int64_t i = 0; i < size; ++i) out[i] = a[i] + b[i];
  }
}

// y += factor alpha x;  alpha is one number, 1 where absent
void axpy(const Call& call) {
  const Axpy& shape = call.shape<Axpy>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), alpha = real(call, 1, task), x = real(call, 2, task);
    const double factor = shape.factor * value_or(alpha, 0, 1.0);
    for (int64_t i = 0; i < shape.size; ++i) y[i] += factor * x[i];
  }
}

}  // namespace fastmaml::reference
