// linear: y = x w + b.     x [N, in]   w [in, out]   b [out]   y [N, out]
#include "cuda/cuda_ops.h"
#include "cuda/kernels/gemm.cuh"
#include "cuda/products.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

template <Precision precision>
struct LinearProducts {
  static constexpr Precision kPrecision = precision;
  const int64_t N, in, out;

  explicit LinearProducts(const Call& call) : LinearProducts(call.step, call.layer) {}
  LinearProducts(const Step& step, const Layer& layer)
      : N(step.examples), in(std::get<Linear>(layer).in), out(std::get<Linear>(layer).out) {
    check_sizes("linear", {N * in, N * out, in * out});
  }

  ProductSize forward_size() const { return {N, out, in}; }
  ProductSize backward_data_size() const { return {N, in, out}; }
  ProductSize backward_weight_size() const { return {in, out, N}; }
  Gemm<Order::along_k, Order::along_rows> forward() const { return {int(N), int(out), int(in)}; }
  Gemm<Order::along_k, Order::along_k> backward_data() const { return {int(N), int(in), int(out)}; }
  Gemm<Order::along_rows, Order::along_rows> backward_weight() const { return {int(in), int(out), int(N)}; }
};

}  // namespace

template <class T, Precision precision>
void add_linear_ops(OpTable& table) {
  add_product_ops<T, LinearProducts<precision>>(table, Op::linear_fwd, product_ops<T, LinearProducts<precision>>);
}
template void add_linear_ops<float, Precision::float32>(OpTable&);
template void add_linear_ops<float, Precision::tf32>(OpTable&);
template void add_linear_ops<float, Precision::tf32x3>(OpTable&);
template void add_linear_ops<float, Precision::bf16x3>(OpTable&);
template void add_linear_ops<double, Precision::float32>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
