// linear: y = x w + b.     x [N, in]   w [in, out], or [out, in] with Linear::out_in   b [out]   y [N, out]
#include <vector>

#include "reference/reference.h"

namespace fastmaml::reference {

namespace {

// where w[i, o] lies
int64_t place(const Linear& shape, int64_t i, int64_t o) { return shape.out_in ? o * shape.in + i : i * shape.out + o; }

// y = b in every row
void set_rows(Real y, Real b, int64_t N, const Linear& shape) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t o = 0; o < shape.out; ++o) y[n * shape.out + o] = value_or(b, o, 0.0);
}

// y += x w
void add_product(Real y, Real x, Real w, int64_t N, const Linear& shape) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = 0; i < shape.in; ++i)
      for (int64_t o = 0; o < shape.out; ++o) y[n * shape.out + o] += x[n * shape.in + i] * w[place(shape, i, o)];
}

// dx += dy w^T
void add_data_gradient(Real dx, Real dy, Real w, int64_t N, const Linear& shape) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = 0; i < shape.in; ++i)
      for (int64_t o = 0; o < shape.out; ++o) dx[n * shape.in + i] += dy[n * shape.out + o] * w[place(shape, i, o)];
}

// dw += x^T dy
void add_weight_gradient(Real dw, Real x, Real dy, int64_t N, const Linear& shape) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = 0; i < shape.in; ++i)
      for (int64_t o = 0; o < shape.out; ++o) dw[place(shape, i, o)] += x[n * shape.in + i] * dy[n * shape.out + o];
}

// db = sum over n of dy
void bias_gradient(Real db, Real dy, int64_t N, const Linear& shape) {
  fill(db, shape.out, 0.0);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t o = 0; o < shape.out; ++o) db[o] += dy[n * shape.out + o];
}

}  // namespace

// y = x w + b
void linear_fwd(const Call& call) {
  const Linear& shape = call.shape<Linear>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), x = real(call, 1, task), w = real(call, 2, task), b = real(call, 3, task);
    set_rows(y, b, N, shape);
    add_product(y, x, w, N, shape);
    if (shape.y.on) rectify(y, y, N * shape.out, shape.y.slope);
  }
}

// y' = x' w + x w' + b'
void linear_fwd_jvp(const Call& call) {
  const Linear& shape = call.shape<Linear>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y_dot = real(call, 0, task), x = real(call, 1, task), x_dot = real(call, 2, task);
    const Real w = real(call, 3, task), w_dot = real(call, 4, task), b_dot = real(call, 5, task), y = real(call, 6, task);
    set_rows(y_dot, b_dot, N, shape);
    if (x_dot) add_product(y_dot, x_dot, w, N, shape);
    add_product(y_dot, x, w_dot, N, shape);
    if (y) rectify(y_dot, y, N * shape.out, shape.y.slope);
  }
}

void linear_fwd_dual(const Call& call) {
  const View fwd[] = {call[0], call[2], call[4], call[6]};
  const View y = call.shape<Linear>().y.on ? call[0] : View{};
  const View jvp[] = {call[1], call[2], call[3], call[4], call[5], call[7], y};
  linear_fwd(with_operands(call, fwd));
  linear_fwd_jvp(with_operands(call, jvp));
}

// dx = dy w^T
void linear_bwd_data(const Call& call) {
  const Linear& shape = call.shape<Linear>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx = real(call, 0, task), dy = real(call, 1, task), w = real(call, 2, task), x = real(call, 3, task);
    fill(dx, N * shape.in, 0.0);
    add_data_gradient(dx, dy, w, N, shape);
    if (x) rectify(dx, x, N * shape.in, shape.x.slope);
  }
}

// dx' = dy' w^T + dy w'^T
void linear_bwd_data_jvp(const Call& call) {
  const Linear& shape = call.shape<Linear>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx_dot = real(call, 0, task), dy = real(call, 1, task), dy_dot = real(call, 2, task);
    const Real w = real(call, 3, task), w_dot = real(call, 4, task), x = real(call, 5, task);
    fill(dx_dot, N * shape.in, 0.0);
    add_data_gradient(dx_dot, dy_dot, w, N, shape);
    add_data_gradient(dx_dot, dy, w_dot, N, shape);
    if (x) rectify(dx_dot, x, N * shape.in, shape.x.slope);
  }
}

void linear_bwd_data_dual(const Call& call) {
  const View bwd[] = {call[0], call[2], call[4], call[6]};
  const View jvp[] = {call[1], call[2], call[3], call[4], call[5], call[6]};
  linear_bwd_data(with_operands(call, bwd));
  linear_bwd_data_jvp(with_operands(call, jvp));
}

// dw = x^T dy;   db = sum over n of dy
void linear_bwd_weight(const Call& call) {
  const Linear& shape = call.shape<Linear>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dw = real(call, 0, task), db = real(call, 1, task), x = real(call, 2, task), dy = real(call, 3, task);
    fill(dw, shape.in * shape.out, 0.0);
    add_weight_gradient(dw, x, dy, N, shape);
    if (db) bias_gradient(db, dy, N, shape);
  }
}

// dw' = x'^T dy + x^T dy';   db' = sum over n of dy'
void linear_bwd_weight_jvp(const Call& call) {
  const Linear& shape = call.shape<Linear>();
  const int64_t N = call.step.examples;
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dw_dot = real(call, 0, task), db_dot = real(call, 1, task);
    const Real x = real(call, 2, task), x_dot = real(call, 3, task);
    const Real dy = real(call, 4, task), dy_dot = real(call, 5, task);
    fill(dw_dot, shape.in * shape.out, 0.0);
    if (x_dot) add_weight_gradient(dw_dot, x_dot, dy, N, shape);
    add_weight_gradient(dw_dot, x, dy_dot, N, shape);
    if (db_dot) bias_gradient(db_dot, dy_dot, N, shape);
  }
}

// w_next = w - rate dw;   b_next = b - rate db
void linear_update(const Call& call) {
  const Linear& shape = call.shape<Linear>();
  const View gradient[] = {call[0], call[1], call[2], call[3]};
  linear_bwd_weight(with_operands(call, gradient));
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real w_next = real(call, 0, task), b_next = real(call, 1, task);
    const Real w = real(call, 4, task), b = real(call, 5, task), rate = real(call, 6, task);
    for (int64_t i = 0; i < shape.in * shape.out; ++i) w_next[i] = w[i] - rate[0] * w_next[i];
    for (int64_t o = 0; b_next && o < shape.out; ++o) b_next[o] = b[o] - rate[0] * b_next[o];
  }
}

// w_adj -= rate dw';   b_adj -= rate db'
void linear_adjoint(const Call& call) {
  const Linear& shape = call.shape<Linear>();
  const int64_t N = call.step.examples;
  std::vector<double> room(size_t(shape.in * shape.out + shape.out));
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real w_adj = real(call, 0, task), b_adj = real(call, 1, task), x = real(call, 2, task), x_dot = real(call, 3, task);
    const Real dy = real(call, 4, task), dy_dot = real(call, 5, task), rate = real(call, 6, task);
    const Real dw_dot{room.data(), 1}, db_dot{room.data() + shape.in * shape.out, 1};
    fill(dw_dot, shape.in * shape.out, 0.0);
    if (x_dot) add_weight_gradient(dw_dot, x_dot, dy, N, shape);
    add_weight_gradient(dw_dot, x, dy_dot, N, shape);
    for (int64_t i = 0; i < shape.in * shape.out; ++i) w_adj[i] -= rate[0] * dw_dot[i];
    if (!b_adj) continue;
    bias_gradient(db_dot, dy_dot, N, shape);
    for (int64_t o = 0; o < shape.out; ++o) b_adj[o] -= rate[0] * db_dot[o];
  }
}

}  // namespace fastmaml::reference
