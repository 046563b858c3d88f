// Shared by the files of cpu/lanes/: ops on kLanes tasks at once, a task in each lane of a vector.
// Every op is written as if for one task. Lanes without a task hold another task's numbers and are computed like the rest.
#pragma once

#include "cpu/layout.h"

FASTMAML_CPU_BEGIN

// Group g's operand i, [size, kLanes]; null where absent.
template <class T>
inline T* in_lanes(const Call& call, int i, int64_t g) {
  return LaneMajor<T>::operand(call, i, g).data;
}

// The rectifier of layers.h, or its derivative times d. The sign may come from the output or from the argument.
// NaN counts as positive for a ReLU.
template <class T>
struct LaneRectifier {
  bool on;
  T slope;
  explicit LaneRectifier(const Rectified& r) : on(r.on), slope(T(r.slope)) {}

  Vec<T> operator()(Vec<T> y, Vec<T> d) const {
    const Vec<T> low = slope == T(0) ? (y != y ? d : Vec<T>{}) : d * slope;
    return y > Vec<T>{} ? d : low;
  }
};

template <class T>
void add_lane_linear_ops(OpTable& table);  // linear.cpp
template <class T>
void add_lane_loss_ops(OpTable& table);  // loss.cpp
template <class T>
void add_lane_group_norm_ops(OpTable& table);  // group_norm.cpp

FASTMAML_CPU_END
