// The two layouts of tasks (View in ops/ops.h), so that an element-wise op is written once for both.
//   for (int64_t g = 0; g < Layout::groups(call); ++g)       a task, or kLanes tasks in lanes
//     Layout::each(size, [&](auto lane, int64_t i) { ... })  with  using V = decltype(lane)  as in for_lanes
// A Number is one value for every task of a group: a double, or a vector with a task in each lane.
// Arguments that all tasks share (rates, mask, lam, weights of losses) are not interleaved; shared() broadcasts them.
#pragma once

#include "cpu/cpu.h"

FASTMAML_CPU_BEGIN

inline constexpr int64_t kPage = 4096;

template <class T>
struct TaskMajor {
  using Type = T;
  using Number = double;

  struct Operand {
    T* data;
    explicit operator bool() const { return data != nullptr; }
    template <class V>
    V get(int64_t i) const {
      return load<V>(data + i);
    }
    // prefetches one page ahead; the hardware prefetcher stops at the end of a page
    void ahead(int64_t i) const { __builtin_prefetch(data + i + kPage / int64_t(sizeof(T))); }
    template <class V>
    void put(int64_t i, V v) const {
      store(data + i, v);
    }
    // element i, alone
    Number number(int64_t i) const { return double(data[i]); }
    void put_number(int64_t i, Number x) const { data[i] = T(x); }
  };
  using Shared = Operand;

  static int64_t groups(const Call& call) { return call.tasks; }
  static Operand operand(const Call& call, int i, int64_t group) { return {at<T>(call, i, group)}; }
  static Shared shared(const Call& call, int i, int64_t group) { return operand(call, i, group); }
  template <class F>
  static void each(int64_t n, F f) {
    for_lanes<T>(n, f);
  }
  // sum over i of f(V{}, i)
  template <class F>
  static Number sum(int64_t n, F f) {
    return block_sum<T>(n, f);
  }
  template <class V>
  static V everywhere(Number x) {
    return broadcast<V>(T(x));
  }
  static Number constant(double x) { return x; }
  static bool any(bool condition) { return condition; }
};

// A sum that keeps its rounding errors (Knuth's two-sum), for lanes, which have no room for doubles.
template <class V>
class LaneSum {
 public:
  void add(V x) {
    const V total = sum_ + x, of_x = total - sum_;
    lost_ += (sum_ - (total - of_x)) + (x - of_x);
    sum_ = total;
  }
  V value() const { return lost_ == lost_ ? sum_ + lost_ : sum_; }  // an overflow stays infinite instead of NaN

 private:
  V sum_{}, lost_{};
};

template <class T>
struct LaneMajor {
  using Type = T;
  using Number = Vec<T>;
  static constexpr int64_t L = kLanes<T>;

  struct Operand {
    T* data;
    explicit operator bool() const { return data != nullptr; }
    template <class V>
    V get(int64_t i) const {
      return load<V>(data + i * L);
    }
    void ahead(int64_t i) const { __builtin_prefetch(data + i * L + kPage / int64_t(sizeof(T))); }
    template <class V>
    void put(int64_t i, V v) const {
      store(data + i * L, v);
    }
    Number number(int64_t i) const { return load<Number>(data + i * L); }
    void put_number(int64_t i, Number x) const { store(data + i * L, x); }
  };
  struct Shared {
    const T* data;
    explicit operator bool() const { return data != nullptr; }
    template <class V>
    V get(int64_t i) const {
      return broadcast<V>(data[i]);
    }
    Number number(int64_t i) const { return get<Number>(i); }
  };

  static int64_t groups(const Call& call) { return (call.tasks + L - 1) / L; }
  static Operand operand(const Call& call, int i, int64_t group) {
    const View& view = call.operand[i];
    return {view.data ? static_cast<T*>(view.data) + group * view.task_stride * L : nullptr};
  }
  static Shared shared(const Call& call, int i, int64_t) { return {static_cast<const T*>(call.operand[i].data)}; }
  template <class F>
  static void each(int64_t n, F f) {
    for (int64_t i = 0; i < n; ++i) f(Number{}, i);
  }
  template <class F>
  static Number sum(int64_t n, F f) {
    constexpr int64_t kBlock = 16;
    LaneSum<Number> total;
    for (int64_t from = 0; from < n; from += kBlock) {
      Number block{};
      const int64_t to = from + kBlock < n ? from + kBlock : n;
      for (int64_t i = from; i < to; ++i) block += f(Number{}, i);
      total.add(block);
    }
    return total.value();
  }
  template <class V>
  static V everywhere(Number x) {
    return x;
  }
  static Number constant(double x) { return broadcast<Number>(T(x)); }
  template <class M>
  static bool any(M condition) {
    for (int64_t i = 0; i < L; ++i)
      if (condition[i]) return true;
    return false;
  }
};

template <class Layout>
void add_vector_ops(OpTable& table);  // vector.cpp
template <class Layout>
void add_copy_op(OpTable& table);  // copy.cpp
template <class Layout>
void add_pointwise_ops(OpTable& table);  // pointwise.cpp
template <class Layout>
void add_update_ops(OpTable& table);  // updates.cpp
template <class Layout>
void add_clip_ops(OpTable& table);  // clip.cpp
template <class Layout>
void add_update_rule_ops(OpTable& table);  // update_rule.cpp

#define FASTMAML_BOTH_LAYOUTS(add_ops)                \
  template void add_ops<TaskMajor<float>>(OpTable&);  \
  template void add_ops<TaskMajor<double>>(OpTable&); \
  template void add_ops<LaneMajor<float>>(OpTable&);  \
  template void add_ops<LaneMajor<double>>(OpTable&);

FASTMAML_CPU_END
