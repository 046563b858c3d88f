// The inner loop, its adjoint (ALGORITHMS section 1.1) and the mean over tasks.     all [P]
#include "reference/reference.h"

namespace fastmaml::reference {

// phi_next = phi - rate g
void sgd_update(const Call& call) {
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real phi_next = real(call, 0, task), phi = real(call, 1, task), g = real(call, 2, task), rate = real(call, 3, task);
    for (int64_t i = 0; i < call.shape<Vector>().size; ++i) phi_next[i] = phi[i] - rate[i] * g[i];
  }
}

// phi_next = phi - rate g with one rate for all
void uniform_update(const Call& call) {
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real phi_next = real(call, 0, task), phi = real(call, 1, task), g = real(call, 2, task), rate = real(call, 3, task);
    for (int64_t i = 0; i < call.shape<Vector>().size; ++i) phi_next[i] = phi[i] - rate[0] * g[i];
  }
}

// u = rate lambda
void scale_by_rate(const Call& call) {
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real u = real(call, 0, task), rate = real(call, 1, task), lambda = real(call, 2, task);
    for (int64_t i = 0; i < call.shape<Vector>().size; ++i) u[i] = rate[i] * lambda[i];
  }
}

// rate_grad -= g lambda, in place: summed over the inner steps that share a rate
void rate_grad(const Call& call) {
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real rate_grad = real(call, 0, task), g = real(call, 1, task), lambda = real(call, 2, task);
    for (int64_t i = 0; i < call.shape<Vector>().size; ++i) rate_grad[i] -= g[i] * lambda[i];
  }
}

// lambda -= hu, in place
void adjoint_update(const Call& call) {
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real lambda = real(call, 0, task), hu = real(call, 1, task);
    for (int64_t i = 0; i < call.shape<Vector>().size; ++i) lambda[i] -= hu[i];
  }
}

// rate_grad -= g lambda;  lambda -= hu;  u = rate lambda
void sgd_adjoint(const Call& call) {
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real lambda = real(call, 0, task), rate_grad = real(call, 1, task), u = real(call, 2, task);
    const Real hu = real(call, 3, task), g = real(call, 4, task), rate = real(call, 5, task);
    for (int64_t i = 0; i < call.shape<Vector>().size; ++i) {
      if (rate_grad) rate_grad[i] -= g[i] * lambda[i];
      lambda[i] -= hu[i];
      if (u) u[i] = rate[i] * lambda[i];
    }
  }
}

// g += lam (phi - theta), in place: the gradient of lam / 2 |phi - theta|^2
void proximal(const Call& call) {
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real g = real(call, 0, task), lam = real(call, 1, task), phi = real(call, 2, task), theta = real(call, 3, task);
    for (int64_t i = 0; i < call.shape<Vector>().size; ++i) g[i] += lam[0] * (phi[i] - theta[i]);
  }
}

void tree_add(void* a, const void* b, int64_t size) {
  for (int64_t i = 0; i < size; ++i) static_cast<double*>(a)[i] += static_cast<const double*>(b)[i];
}

// out = sum_t w[t] x[t], or the mean if w is null. Neighbours are added first, so the order depends on the task index alone.
void tree_reduce(void* out, void* x, const void* w, int64_t tasks, int64_t size, int64_t stride, uintptr_t /* stream */) {
  double* sum = static_cast<double*>(out);
  double* leaf = static_cast<double*>(x);  // [tasks, stride], overwritten by the partial sums
  const double* weight = static_cast<const double*>(w);
  if (weight)
    for (int64_t t = 0; t < tasks; ++t)
      for (int64_t i = 0; i < size; ++i) leaf[t * stride + i] *= weight[t];
  for (int64_t apart = 1; apart < tasks; apart *= 2)
    for (int64_t t = 0; t + apart < tasks; t += 2 * apart) tree_add(leaf + t * stride, leaf + (t + apart) * stride, size);
  const double mean = weight ? 1.0 : 1.0 / static_cast<double>(tasks);
  for (int64_t i = 0; i < size; ++i) sum[i] = leaf[i] * mean;
}

}  // namespace fastmaml::reference
