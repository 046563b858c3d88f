// Fills the tables of the CUDA backend.
#include "cuda/cuda_ops.h"

namespace fastmaml {
namespace FASTMAML_CUDA_NS {
namespace {

template <class T>
OpTable make_table(const char* backend) {
  OpTable table;
  table.backend = backend;
  table.real_bytes = sizeof(T);
  table.device = device<T>();
  table.rectifies = true;
  add_vector_ops<T>(table);
  add_linear_ops<T>(table);
  add_conv2d_ops<T>(table);
  add_batch_norm_ops<T>(table);
  add_group_norm_ops<T>(table);
  add_pointwise_ops<T>(table);
  add_pool2d_ops<T>(table);
  add_norm_pool_act_ops<T>(table);
  add_loss_ops<T>(table);
  add_update_ops<T>(table);
  add_update_rule_ops<T>(table);
  add_resident<T>(table);
  return table;
}

const OpTable& table(size_t real_bytes, const char* backend) {
  static const OpTable floats = make_table<float>(backend), doubles = make_table<double>(backend);
  return real_bytes == sizeof(float) ? floats : doubles;
}

template <Precision precision>
const OpTable& tensor_table(const char* backend) {
  static const OpTable floats = [=] {
    OpTable table = make_table<float>(backend);
    add_linear_ops<float, precision>(table);
    add_conv2d_ops<float, precision>(table);
    return table;
  }();
  return floats;
}

const OpTable& table(Precision precision, const char* backend) {
  if (precision == Precision::tf32) return tensor_table<Precision::tf32>(backend);
  if (precision == Precision::tf32x3) return tensor_table<Precision::tf32x3>(backend);
  if (precision == Precision::bf16x3) return tensor_table<Precision::bf16x3>(backend);
  return table(sizeof(float), backend);
}

}  // namespace
}  // namespace FASTMAML_CUDA_NS

#ifdef FASTMAML_EMULATED
const OpTable& cuda_emulated_ops(size_t real_bytes) { return cuda_emulated::table(real_bytes, "cuda_emulated"); }
const OpTable& cuda_emulated_tensor_ops(Precision precision) { return cuda_emulated::table(precision, "cuda_emulated"); }
#else
const OpTable& cuda_ops(size_t real_bytes) { return cuda::table(real_bytes, "cuda"); }
const OpTable& cuda_tensor_ops(Precision precision) { return cuda::table(precision, "cuda"); }

#ifdef FASTMAML_STAMP  // as a shared library
extern "C" __attribute__((visibility("default"))) const OpTable* fastmaml_cuda_table(Precision precision, size_t real_bytes) {
  return precision == Precision::float32 ? &cuda_ops(real_bytes) : &cuda_tensor_ops(precision);
}
#define FASTMAML_TEXT_OF(x) #x
#define FASTMAML_TEXT(x) FASTMAML_TEXT_OF(x)
extern "C" __attribute__((visibility("default"))) const char* fastmaml_cuda_stamp() { return FASTMAML_TEXT(FASTMAML_STAMP); }
#endif
#endif

}  // namespace fastmaml
