// Fills the two tables of one instruction set: one task at a time, and tasks in lanes.
#include "cpu/choose.h"
#include "cpu/lanes/lanes.h"

FASTMAML_CPU_BEGIN
namespace {

template <class Layout>
OpTable elementwise_table() {
  OpTable table;
  table.backend = "cpu";
  table.real_bytes = sizeof(typename Layout::Type);
  add_copy_op<Layout>(table);
  add_vector_ops<Layout>(table);
  add_pointwise_ops<Layout>(table);
  add_update_ops<Layout>(table);
  add_clip_ops<Layout>(table);
  add_update_rule_ops<Layout>(table);
  return table;
}

template <class T>
OpTable lane_table() {
  OpTable table = elementwise_table<LaneMajor<T>>();
  table.lanes = kLanes<T>;
  table.rectifies = true;
  add_lane_linear_ops<T>(table);
  add_lane_group_norm_ops<T>(table);
  add_lane_loss_ops<T>(table);
  return table;
}

template <class T>
OpTable task_table() {
  static const OpTable lanes = lane_table<T>();
  static const LaneOps in_lanes{&lanes, lanes_run, lanes_pay_off};
  OpTable table = elementwise_table<TaskMajor<T>>();
  table.in_lanes = &in_lanes;
  table.out_in = true;
  add_linear_ops<T>(table);
  add_conv2d_ops<T>(table);
  add_batch_norm_ops<T>(table);
  add_norm_pool_act_ops<T>(table);
  add_group_norm_ops<T>(table);
  add_pool2d_ops<T>(table);
  add_loss_ops<T>(table);
  return table;
}

}  // namespace

const OpTable& table(size_t real_bytes) {
  static const OpTable floats = task_table<float>(), doubles = task_table<double>();
  return real_bytes == sizeof(float) ? floats : doubles;
}

FASTMAML_CPU_END
