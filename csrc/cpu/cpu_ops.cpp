// Fills the table of one instruction set.
#include "cpu/cpu.h"

FASTMAML_CPU_BEGIN
namespace {

template <class T>
OpTable make_table() {
  OpTable table;
  table.backend = "cpu";
  table.real_bytes = sizeof(T);
  add_vector_ops<T>(table);
  add_linear_ops<T>(table);
  add_conv2d_ops<T>(table);
  add_batch_norm_ops<T>(table);
  add_norm_pool_act_ops<T>(table);
  add_group_norm_ops<T>(table);
  add_pointwise_ops<T>(table);
  add_pool2d_ops<T>(table);
  add_loss_ops<T>(table);
  add_update_ops<T>(table);
  add_clip_ops<T>(table);
  add_update_rule_ops<T>(table);
  return table;
}

}  // namespace

const OpTable& table(size_t real_bytes) {
  static const OpTable floats = make_table<float>(), doubles = make_table<double>();
  return real_bytes == sizeof(float) ? floats : doubles;
}

FASTMAML_CPU_END
