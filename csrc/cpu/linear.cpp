// linear: y = x w + b with w [in, out], and its tangents; see ALGORITHMS section 6.
#include "cpu/cpu.h"
#include "cpu/kernels/row_product.h"

FASTMAML_CPU_BEGIN
namespace {

template <class T>
struct Work {  // scratch of one Step, laid out the same when it is measured and when it is used
  int32_t* a_at;
  T *first, *second;  // weights in whole vectors, or transposed
  Term<T>* terms;
  T* rows[2];  // dy, dy_dot in whole vectors
  OuterPack<T> pack;
  double* sums;

  Work(Scratch& scratch, const Linear& s, int64_t N) {
    const int64_t forward = s.in * padded_cols<T>(s.out), backward = s.out * padded_cols<T>(s.in),
                  most = forward > backward ? forward : backward;
    a_at = scratch.take<int32_t>(N);
    first = scratch.take<T>(most);
    second = scratch.take<T>(most);
    terms = scratch.take<Term<T>>(2 * term_count<T>(s.in > s.out ? s.in : s.out));
    for (T*& r : rows) r = scratch.take<T>(kBlockPixels * padded_cols<T>(s.out));
    const int64_t pixels = N < kBlockPixels ? N : kBlockPixels;
    const bool packs = OuterPack<T>::pays(s.in, s.out, pixels);
    for (T*& a : pack.a) a = packs ? scratch.take<T>(OuterPack<T>::a_size(pixels)) : nullptr;
    for (T*& b : pack.b) b = packs ? scratch.take<T>(OuterPack<T>::b_size(s.out, pixels)) : nullptr;
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
      : s(*std::get_if<Linear>(&call.layer)), N(call.step.examples), scratch(call.scratch), work(scratch, s, N) {}

  void row_starts(int64_t length) {
    for (int64_t n = 0; n < N; ++n) work.a_at[n] = int32_t(n * length);
  }
  const T* whole_vectors(T* buffer, const T* w) const {
    const int64_t ld = padded_cols<T>(s.out);
    if (ld == s.out) return w;
    pad_rows(buffer, w, s.in, s.out, ld);
    return buffer;
  }
  const T* transposed(T* buffer, const T* w) const {
    transpose(buffer, w, s.in, s.out, padded_cols<T>(s.in));
    return buffer;
  }
  // out [N, cols] = bias + a b (+ c d): a, c are [N, depth]; b, d [depth, cols in whole vectors]
  void product(T* out, int64_t cols, int64_t depth, const T* a, const T* b, const T* c, const T* d, const T* bias) {
    const int64_t ldb = padded_cols<T>(cols);
    int n = split_term(work.terms, 0, b, depth, ldb);
    if (c) n += split_term(work.terms + n, c - a, d, depth, ldb);
    row_product(RowProduct<T>{out, nullptr, a, work.a_at, N, cols, ldb, bias}, work.terms, n);
  }
};

template <class T>
void linear_fwd(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    task.row_starts(task.s.in);
    const T* w = task.whole_vectors(task.work.first, at<T>(call, 2, t));
    task.product(at<T>(call, 0, t), task.s.out, task.s.in, at<T>(call, 1, t), w, nullptr, nullptr, at<T>(call, 3, t));
  }
}

template <class T>
void tangent(Task<T>& task, T* y_dot, const T* x, const T* x_dot, const T* w, const T* w_dot, const T* b_dot) {
  task.product(y_dot, task.s.out, task.s.in, x, w_dot, x_dot, w, b_dot);
}

template <class T>
void linear_fwd_jvp(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    task.row_starts(task.s.in);
    const T* x_dot = at<T>(call, 2, t);
    const T* w = x_dot ? task.whole_vectors(task.work.first, at<T>(call, 3, t)) : nullptr;
    const T* w_dot = task.whole_vectors(task.work.second, at<T>(call, 4, t));
    tangent<T>(task, at<T>(call, 0, t), at<T>(call, 1, t), x_dot, w, w_dot, at<T>(call, 5, t));
  }
}

template <class T>
void linear_fwd_dual(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    task.row_starts(task.s.in);
    const T *x = at<T>(call, 2, t), *x_dot = at<T>(call, 3, t);
    const T* w = task.whole_vectors(task.work.first, at<T>(call, 4, t));
    const T* w_dot = task.whole_vectors(task.work.second, at<T>(call, 5, t));
    task.product(at<T>(call, 0, t), task.s.out, task.s.in, x, w, nullptr, nullptr, at<T>(call, 6, t));
    tangent<T>(task, at<T>(call, 1, t), x, x_dot, w, w_dot, at<T>(call, 7, t));
  }
}

template <class T>
void linear_bwd_data(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    task.row_starts(task.s.out);
    const T* w = task.transposed(task.work.first, at<T>(call, 2, t));
    task.product(at<T>(call, 0, t), task.s.in, task.s.out, at<T>(call, 1, t), w, nullptr, nullptr, nullptr);
  }
}

template <class T>
void linear_bwd_data_jvp(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    task.row_starts(task.s.out);
    const T *w = task.transposed(task.work.first, at<T>(call, 3, t)), *w_dot = task.transposed(task.work.second, at<T>(call, 4, t));
    task.product(at<T>(call, 0, t), task.s.in, task.s.out, at<T>(call, 2, t), w, at<T>(call, 1, t), w_dot, nullptr);
  }
}

template <class T>
void linear_bwd_data_dual(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    task.row_starts(task.s.out);
    const T *dy = at<T>(call, 2, t), *dy_dot = at<T>(call, 3, t);
    const T *w = task.transposed(task.work.first, at<T>(call, 4, t)), *w_dot = task.transposed(task.work.second, at<T>(call, 5, t));
    task.product(at<T>(call, 0, t), task.s.in, task.s.out, dy, w, nullptr, nullptr, nullptr);
    task.product(at<T>(call, 1, t), task.s.in, task.s.out, dy_dot, w, dy, w_dot, nullptr);
  }
}

// dw = sum over terms of x^T dy; at most two terms.
template <class T>
void weight_gradient(Task<T>& task, T* dw, const T* const* x, const T* const* dy, int n_terms) {
  const Linear& s = task.s;
  const int64_t ld = padded_cols<T>(s.out);
  OuterTerm<T> terms[2];
  task.row_starts(s.in);
  for (int64_t from = 0; from < task.N; from += kBlockPixels) {
    const int64_t count = task.N - from < kBlockPixels ? task.N - from : kBlockPixels;
    if (OuterPack<T>::pays(s.in, s.out, count)) {
      for (int i = 0; i < n_terms; ++i) terms[i] = {x[i], dy[i] + from * s.out};
      packed_outer_product(dw, s.in, s.out, terms, n_terms, task.work.a_at + from, count, from == 0, task.work.pack);
      continue;
    }
    for (int i = 0; i < n_terms; ++i) {
      const T* rows = dy[i] + from * s.out;
      if (ld != s.out) {
        pad_rows(task.work.rows[i], rows, count, s.out, ld);
        rows = task.work.rows[i];
      }
      terms[i] = {x[i], rows};
    }
    outer_product(dw, s.in, s.out, terms, n_terms, task.work.a_at + from, ld, count, from == 0);
  }
}

template <class T>
void bias_gradient(Task<T>& task, T* db, const T* dy) {
  if (!db) return;
  const int64_t out = task.s.out;
  column_sums<T, 1>(task.N, out, task.work.sums,
                    [&](auto lane, int64_t n, int64_t o, auto* sum) { sum[0] = load<decltype(lane)>(dy + n * out + o); });
  for (int64_t o = 0; o < out; ++o) db[o] = T(task.work.sums[o]);
}

template <class T>
void linear_bwd_weight(const Call& call) {
  for (int64_t t = 0; t < call.tasks; ++t) {
    Task<T> task(call);
    const T *x = at<T>(call, 2, t), *dy = at<T>(call, 3, t);
    weight_gradient<T>(task, at<T>(call, 0, t), &x, &dy, 1);
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
    weight_gradient<T>(task, at<T>(call, 0, t), x, d, x[1] ? 2 : 1);
    bias_gradient<T>(task, at<T>(call, 1, t), dy_dot);
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
}
template void add_linear_ops<float>(OpTable&);
template void add_linear_ops<double>(OpTable&);

FASTMAML_CPU_END
