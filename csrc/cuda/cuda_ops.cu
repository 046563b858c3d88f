// Fills the table.
#include "cuda/cuda_ops.h"

namespace fastmaml {
namespace FASTMAML_CUDA_NS {
namespace {

template <class T>
OpTable make_table(const char* backend) {
  OpTable table;
  table.backend = backend;
  table.real_bytes = sizeof(T);
  table.whole_batch = true;
  add_vector_ops<T>(table);
  add_linear_ops<T>(table);
  add_conv2d_ops<T>(table);
  add_batch_norm_ops<T>(table);
  add_group_norm_ops<T>(table);
  add_pointwise_ops<T>(table);
  add_pool2d_ops<T>(table);
  add_loss_ops<T>(table);
  add_update_ops<T>(table);
  add_update_rule_ops<T>(table);
  return table;
}

const OpTable& table(size_t real_bytes, const char* backend) {
  static const OpTable floats = make_table<float>(backend), doubles = make_table<double>(backend);
  return real_bytes == sizeof(float) ? floats : doubles;
}

}  // namespace
}  // namespace FASTMAML_CUDA_NS

#ifdef FASTMAML_EMULATED
const OpTable& cuda_emulated_ops(size_t real_bytes) { return cuda_emulated::table(real_bytes, "cuda_emulated"); }
#else
const OpTable& cuda_ops(size_t real_bytes) { return cuda::table(real_bytes, "cuda"); }
#endif

}  // namespace fastmaml
