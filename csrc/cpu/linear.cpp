// linear: y = x w^T + b with w [out, in] in torch's order (Linear::out_in), and its tangents; see ALGORITHMS section 6.
#include "cpu/cpu.h"
#include "cpu/kernels/dot_product.h"
#include "cpu/kernels/panel_product.h"

FASTMAML_CPU_BEGIN
namespace {

template <class T>
struct Work {            // scratch of one Step, laid out the same when it is measured and when it is used
  int32_t *x_at, *y_at;  // start of each row of x and of y
  T* packed[2];          // slices of w and w_dot
  T* rows[2];            // x, x_dot in whole vectors
  OuterPack<T> pack;
  double* sums;

  Work(Scratch& scratch, const Linear& s, int64_t N) {
    x_at = scratch.take<int32_t>(N);
    y_at = scratch.take<int32_t>(N);
    for (T*& p : packed) p = scratch.take<T>(panel_room<T>());
    const int64_t pixels = N < kBlockPixels ? N : kBlockPixels;
    for (T*& r : rows) r = scratch.take<T>(pixels * padded_cols<T>(s.in));
    const bool packs = OuterPack<T>::pays_off(s.out, s.in, pixels);
    for (T*& a : pack.a) a = packs ? scratch.take<T>(OuterPack<T>::a_size(pixels)) : nullptr;
    for (T*& b : pack.b) b = packs ? scratch.take<T>(OuterPack<T>::b_size(s.in, pixels)) : nullptr;
    pack.at = packs ? scratch.take<int32_t>(pixels) : nullptr;
    sums = scratch.take<double>(s.out);
  }
};

template <class T>
size_t scratch_bytes(const Step& step, const Layer& layer) {
  Scratch scratch(nullptr);
  Work<T>(scratch, *std::get_if<Linear>(&layer), step.examples);
  return scratch.used();
}

template <class T>
struct Task {
  const Linear& s;
  const int64_t N;
  Scratch scratch;
  Work<T> work;

  explicit Task(const Call& call)
      : s(*std::get_if<Linear>(&call.layer)), N(call.step.examples), scratch(call.scratch), work(scratch, s, N) {
    for (int64_t n = 0; n < N; ++n) {
      work.x_at[n] = int32_t(n * s.in);
      work.y_at[n] = int32_t(n * s.out);
    }
  }

  // y = x w^T + b and y_dot = x_dot w^T + x w_dot^T + b_dot. Either output may be absent, and so may x_dot.
  void forward(T* y, T* y_dot, const T* x, const T* x_dot, const T* w, const T* w_dot, const T* b, const T* b_dot) {
    if (dots_pay(N, s.in)) {
      const DotTerm<T> terms[] = {{x, w}, {x, w_dot}, {x_dot, w}};
      if (y) dot_product(y, b, terms, 1, N, s.out, s.in);
      if (y_dot) dot_product(y_dot, b_dot, terms + 1, x_dot ? 2 : 1, N, s.out, s.in);
      return;
    }
    PanelSum<T> sums[2] = {};
    int count = 0;
    if (y) sums[count++] = {y, b, 1, {x}, {0}};
    if (y_dot) sums[count++] = {y_dot, b_dot, x_dot ? 2 : 1, {x, x_dot}, {1, 0}};
    panels<true>(sums, count, y || x_dot ? w : nullptr, w_dot, s.out, s.in, work.x_at, work.y_at);
  }

  // dx = dy w and dx_dot = dy_dot w + dy w_dot. Either output may be absent.
  void backward(T* dx, T* dx_dot, const T* dy, const T* dy_dot, const T* w, const T* w_dot) {
    PanelSum<T> sums[2] = {};
    int count = 0;
    if (dx) sums[count++] = {dx, nullptr, 1, {dy}, {0}};
    if (dx_dot) sums[count++] = {dx_dot, nullptr, 2, {dy_dot, dy}, {0, 1}};
    panels<false>(sums, count, w, w_dot, s.in, s.out, work.y_at, work.x_at);
  }

 private:
  template <bool kTransposed>
  void panels(const PanelSum<T>* sums, int count, const T* w, const T* w_dot, int64_t cols, int64_t depth, const int32_t* a_at,
              const int32_t* out_at) {
    const PanelMatrix<T> matrices[] = {{w, work.packed[0]}, {w_dot, work.packed[1]}};
    panel_product<T, kTransposed>(sums, count, matrices, N, cols, depth, a_at, out_at);
  }
};

template <class T>
void linear_fwd(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t)
    Task<T>(call).forward(at<T>(call, 0, t), nullptr, at<T>(call, 1, t), nullptr, at<T>(call, 2, t), nullptr, at<T>(call, 3, t), nullptr);
}

template <class T>
void linear_fwd_jvp(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t)
    Task<T>(call).forward(nullptr, at<T>(call, 0, t), at<T>(call, 1, t), at<T>(call, 2, t), at<T>(call, 3, t), at<T>(call, 4, t), nullptr,
                          at<T>(call, 5, t));
}

template <class T>
void linear_fwd_dual(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t)
    Task<T>(call).forward(at<T>(call, 0, t), at<T>(call, 1, t), at<T>(call, 2, t), at<T>(call, 3, t), at<T>(call, 4, t), at<T>(call, 5, t),
                          at<T>(call, 6, t), at<T>(call, 7, t));
}

template <class T>
void linear_bwd_data(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t)
    Task<T>(call).backward(at<T>(call, 0, t), nullptr, at<T>(call, 1, t), nullptr, at<T>(call, 2, t), nullptr);
}

template <class T>
void linear_bwd_data_jvp(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t)
    Task<T>(call).backward(nullptr, at<T>(call, 0, t), at<T>(call, 1, t), at<T>(call, 2, t), at<T>(call, 3, t), at<T>(call, 4, t));
}

template <class T>
void linear_bwd_data_dual(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t)
    Task<T>(call).backward(at<T>(call, 0, t), at<T>(call, 1, t), at<T>(call, 2, t), at<T>(call, 3, t), at<T>(call, 4, t),
                           at<T>(call, 5, t));
}

// dw [out, in] = sum over at most two terms of dy^T x. With a base, which may be dw: base - rate times the sum.
template <class T>
void weight_gradient(Task<T>& task, T* dw, const T* const* dy, const T* const* x, int n_terms, const T* base = nullptr, T rate = T(0)) {
  const Linear& s = task.s;
  const int64_t ld = padded_cols<T>(s.in);
  OuterTerm<T> terms[2];
  for (int64_t from = 0; from < task.N; from += kBlockPixels) {
    const int64_t count = task.N - from < kBlockPixels ? task.N - from : kBlockPixels;
    const OuterEnd<T> end{from == 0, base && from > 0 ? dw : base, rate};
    if (OuterPack<T>::pays_off(s.out, s.in, count)) {
      for (int i = 0; i < n_terms; ++i) terms[i] = {dy[i], x[i] + from * s.in};
      packed_outer_product(dw, s.out, s.in, terms, n_terms, task.work.y_at + from, count, end, task.work.pack);
      continue;
    }
    for (int i = 0; i < n_terms; ++i) {
      const T* rows = x[i] + from * s.in;
      if (ld != s.in) {
        pad_rows(task.work.rows[i], rows, count, s.in, ld);
        rows = task.work.rows[i];
      }
      terms[i] = {dy[i], rows};
    }
    outer_product(dw, s.out, s.in, terms, n_terms, task.work.y_at + from, ld, count, end);
  }
}

template <class T>
void bias_gradient(Task<T>& task, T* db, const T* dy, const T* base = nullptr, T rate = T(0)) {
  if (!db) return;
  const int64_t out = task.s.out;
  column_sums<T, 1>(task.N, out, task.work.sums,
                    [&](auto lane, int64_t n, int64_t o, auto* sum) { sum[0] = load<decltype(lane)>(dy + n * out + o); });
  for (int64_t o = 0; o < out; ++o) {
    const T sum = T(task.work.sums[o]);
    db[o] = base ? base[o] - rate * sum : sum;
  }
}

template <class T>
void linear_bwd_weight(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    const T *x = at<T>(call, 2, t), *dy = at<T>(call, 3, t);
    weight_gradient<T>(task, at<T>(call, 0, t), &dy, &x, 1);
    bias_gradient<T>(task, at<T>(call, 1, t), dy);
  }
}

template <class T>
void linear_bwd_weight_jvp(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    const T *dy = at<T>(call, 4, t), *dy_dot = at<T>(call, 5, t);
    const T* x[2] = {at<T>(call, 2, t), at<T>(call, 3, t)};
    const T* d[2] = {dy_dot, dy};
    weight_gradient<T>(task, at<T>(call, 0, t), d, x, x[1] ? 2 : 1);
    bias_gradient<T>(task, at<T>(call, 1, t), dy_dot);
  }
}

template <class T>
void linear_update(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    const T *x = at<T>(call, 2, t), *dy = at<T>(call, 3, t), rate = *at<T>(call, 6, t);
    weight_gradient<T>(task, at<T>(call, 0, t), &dy, &x, 1, at<T>(call, 4, t), rate);
    bias_gradient<T>(task, at<T>(call, 1, t), dy, at<T>(call, 5, t), rate);
  }
}

template <class T>
void linear_adjoint(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    const T *dy = at<T>(call, 4, t), *dy_dot = at<T>(call, 5, t), rate = *at<T>(call, 6, t);
    const T* x[2] = {at<T>(call, 2, t), at<T>(call, 3, t)};
    const T* d[2] = {dy_dot, dy};
    T *w = at<T>(call, 0, t), *b = at<T>(call, 1, t);
    weight_gradient<T>(task, w, d, x, x[1] ? 2 : 1, w, rate);
    bias_gradient<T>(task, b, dy_dot, b, rate);
  }
}

}  // namespace

template <class T>
void add_linear_ops(OpTable& table) {
  set_op(table, Op::linear_fwd, linear_fwd<T>, scratch_bytes<T>);
  set_op(table, Op::linear_fwd_jvp, linear_fwd_jvp<T>, scratch_bytes<T>);
  set_op(table, Op::linear_fwd_dual, linear_fwd_dual<T>, scratch_bytes<T>);
  set_op(table, Op::linear_bwd_data, linear_bwd_data<T>, scratch_bytes<T>);
  set_op(table, Op::linear_bwd_data_jvp, linear_bwd_data_jvp<T>, scratch_bytes<T>);
  set_op(table, Op::linear_bwd_data_dual, linear_bwd_data_dual<T>, scratch_bytes<T>);
  set_op(table, Op::linear_bwd_weight, linear_bwd_weight<T>, scratch_bytes<T>);
  set_op(table, Op::linear_bwd_weight_jvp, linear_bwd_weight_jvp<T>, scratch_bytes<T>);
  set_op(table, Op::linear_update, linear_update<T>, scratch_bytes<T>);
  set_op(table, Op::linear_adjoint, linear_adjoint<T>, scratch_bytes<T>);
}
template void add_linear_ops<float>(OpTable&);
template void add_linear_ops<double>(OpTable&);

FASTMAML_CPU_END
