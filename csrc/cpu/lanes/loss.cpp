// Losses in lanes (ALGORITHMS section 6): a weighted sum over examples, weight 1/N by default, and its gradient by the output.
#include "cpu/kernels/exponential.h"
#include "cpu/lanes/lanes.h"

FASTMAML_CPU_BEGIN
namespace {

template <class T>
struct Group {
  using V = Vec<T>;
  static constexpr int64_t L = kLanes<T>;
  const Call& call;
  const int64_t g;
  const Loss& s = *std::get_if<Loss>(&call.layer);
  const int64_t N = call.step.examples;

  T* operand(int i) const { return in_lanes<T>(call, i, g); }
  V weight(const T* weights, int64_t n) const { return weights ? load<V>(weights + n * L) : broadcast<V>(T(1.0 / double(N))); }

  // The labels of example n in the working type. Label arguments stay task-major.
  V label(int operand, int64_t n) const {
    V classes{};
    for (int64_t l = 0; l < L; ++l) {
      const int64_t task = g * L + l < call.tasks ? g * L + l : call.tasks - 1;
      classes[l] = T(elements<int64_t>(call[operand], task)[n]);
    }
    return classes;
  }
};

// The softmax of one row of outputs. Leaves e^(z - largest) in `e`.
template <class T>
struct Softmax {
  using V = Vec<T>;
  static constexpr int64_t L = kLanes<T>;
  V largest, total, over;

  Softmax(T* e, const T* z, int64_t classes) : largest(load<V>(z)), total{} {
    for (int64_t c = 1; c < classes; ++c) {
      const V x = load<V>(z + c * L);
      largest = x > largest ? x : largest;
    }
    LaneSum<V> sum;
    for (int64_t c = 0; c < classes; ++c) {
      const V p = exp_negative(load<V>(z + c * L) - largest);
      store(e + c * L, p);
      sum.add(p);
    }
    total = sum.value();
    over = T(1) / total;
  }
};

// target = (1 - smoothing) onehot + smoothing / classes;  loss = -sum w target log p;  dz = w (p - target)
template <class T>
void cross_entropy(const Call& call) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  for (int64_t group = 0; group < LaneMajor<T>::groups(call); ++group) {
    const Group<T> g{call, group};
    T *dz = g.operand(1), *e = static_cast<T*>(call.scratch);
    const T *z = g.operand(2), *weights = g.operand(4);
    const int64_t C = g.s.size;
    const V none{}, spread = broadcast<V>(T(g.s.smoothing / double(C))), peak = spread + T(1.0 - g.s.smoothing);
    LaneSum<V> loss;
    for (int64_t n = 0; n < g.N; ++n) {
      const T* row = z + n * C * L;
      const Softmax<T> softmax(e, row, C);
      const V w = g.weight(weights, n), label = g.label(3, n), log_total = log_positive(softmax.total);
      V example{};
      for (int64_t c = 0; c < C; ++c) {
        const V target = label == broadcast<V>(T(c)) ? peak : spread, p = load<V>(e + c * L) * softmax.over;
        const V log_p = (load<V>(row + c * L) - softmax.largest) - log_total;
        example -= target != none ? target * log_p : none;
        if (dz) store(dz + (n * C + c) * L, w * (p - target));
      }
      loss.add(w * example);
    }
    store(g.operand(0), loss.value());
  }
}

// dz_dot = w p (z_dot - <p, z_dot>)
template <class T>
void cross_entropy_jvp(const Call& call) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  for (int64_t group = 0; group < LaneMajor<T>::groups(call); ++group) {
    const Group<T> g{call, group};
    T *dz_dot = g.operand(0), *e = static_cast<T*>(call.scratch);
    const T *z = g.operand(1), *z_dot = g.operand(2), *weights = g.operand(4);
    const int64_t C = g.s.size;
    for (int64_t n = 0; n < g.N; ++n) {
      const T* row_dot = z_dot + n * C * L;
      const Softmax<T> softmax(e, z + n * C * L, C);
      V mean{};
      for (int64_t c = 0; c < C; ++c) mean += load<V>(e + c * L) * load<V>(row_dot + c * L);
      mean *= softmax.over;
      const V scale = g.weight(weights, n) * softmax.over;
      for (int64_t c = 0; c < C; ++c) store(dz_dot + (n * C + c) * L, scale * load<V>(e + c * L) * (load<V>(row_dot + c * L) - mean));
    }
  }
}

// loss = sum w mean((z - target)^2);  dz = 2 w (z - target) / size
template <class T>
void mse(const Call& call) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  for (int64_t group = 0; group < LaneMajor<T>::groups(call); ++group) {
    const Group<T> g{call, group};
    T* dz = g.operand(1);
    const T *z = g.operand(2), *target = g.operand(3), *weights = g.operand(4);
    LaneSum<V> loss;
    for (int64_t n = 0; n < g.N; ++n) {
      const V w = g.weight(weights, n) * T(1.0 / double(g.s.size));
      for (int64_t i = n * g.s.size; i < (n + 1) * g.s.size; ++i) {
        const V error = load<V>(z + i * L) - load<V>(target + i * L);
        loss.add(w * error * error);
        if (dz) store(dz + i * L, T(2) * w * error);
      }
    }
    store(g.operand(0), loss.value());
  }
}

template <class T>
void mse_jvp(const Call& call) {
  using V = Vec<T>;
  constexpr int64_t L = kLanes<T>;
  for (int64_t group = 0; group < LaneMajor<T>::groups(call); ++group) {
    const Group<T> g{call, group};
    T* dz_dot = g.operand(0);
    const T *z_dot = g.operand(2), *weights = g.operand(4);
    for (int64_t n = 0; n < g.N; ++n) {
      const V w = g.weight(weights, n) * T(2.0 / double(g.s.size));
      for (int64_t i = n * g.s.size; i < (n + 1) * g.s.size; ++i) store(dz_dot + i * L, w * load<V>(z_dot + i * L));
    }
  }
}

template <class T>
size_t row_bytes(const Step&, const Layer& layer) {
  return size_t(std::get_if<Loss>(&layer)->size) * kLanes<T> * sizeof(T);
}

}  // namespace

template <class T>
void add_lane_loss_ops(OpTable& table) {
  set_op(table, Op::cross_entropy, cross_entropy<T>, row_bytes<T>);
  set_op(table, Op::cross_entropy_jvp, cross_entropy_jvp<T>, row_bytes<T>);
  set_op(table, Op::mse, mse<T>);
  set_op(table, Op::mse_jvp, mse_jvp<T>);
}
template void add_lane_loss_ops<float>(OpTable&);
template void add_lane_loss_ops<double>(OpTable&);

FASTMAML_CPU_END
