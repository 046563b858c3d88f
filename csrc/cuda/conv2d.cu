// conv2d (torch's cross-correlation), zero padding.   x [N, H, W, C]   w [KH, KW, C, F]   b [F]   y [N, OH, OW, F]
// A 1x1 convolution with stride 1 and no padding runs as a linear layer on pixels.
#include "cuda/cuda_ops.h"
#include "cuda/kernels/conv2d.cuh"
#include "cuda/products.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

template <Precision precision>
struct ConvProducts {
  static constexpr Precision kPrecision = precision;
  const Conv2d& s;
  const int64_t N, in, out;

  explicit ConvProducts(const Call& call) : ConvProducts(call.step, call.layer) {}
  ConvProducts(const Step& step, const Layer& layer) : s(std::get<Conv2d>(layer)), N(step.examples), in(s.C), out(s.F) {
    check_sizes("conv2d", {N * (s.H + 2 * s.pad_h) * (s.W + 2 * s.pad_w) * s.C, N * s.OH * s.OW * s.F, s.KH * s.KW * s.C * s.F});
  }

  ProductSize forward_size() const { return {N * s.OH * s.OW, s.F, s.KH * s.KW * s.C}; }
  ProductSize backward_data_size() const { return {N * s.H * s.W, s.C, s.KH * s.KW * s.F}; }
  ProductSize backward_weight_size() const { return {s.KH * s.KW * s.C, s.F, N * s.OH * s.OW}; }
  ConvForward forward() const { return ConvForward{sizes()}; }
  ConvBackwardData backward_data() const { return ConvBackwardData{sizes()}; }
  ConvBackwardWeight backward_weight() const { return ConvBackwardWeight{sizes()}; }

  ConvSizes sizes() const {
    return {int(N),    int(s.C),  int(s.H),        int(s.W),        int(s.F),     int(s.OH),   int(s.OW),
            int(s.KH), int(s.KW), int(s.stride_h), int(s.stride_w), int(s.pad_h), int(s.pad_w)};
  }
};

bool is_linear(const Conv2d& s) { return s.KH == 1 && s.KW == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0; }

template <class T, Precision precision>
const OpTable& linear_table() {
  static const OpTable table = [] {
    OpTable linear;
    add_linear_ops<T, precision>(linear);
    return linear;
  }();
  return table;
}

template <class T, Precision precision, int op>
void run(const Call& call) {
  const Conv2d& s = call.shape<Conv2d>();
  if (!is_linear(s)) return product_ops<T, ConvProducts<precision>>[op](call);
  const Layer layer = Linear{s.C, s.F, s.y, s.x};
  Step step = call.step;
  step.examples *= s.H * s.W;
  linear_table<T, precision>().run[static_cast<int>(Op::linear_fwd) + op](
      {step, layer, call.operand, call.tasks, call.scratch, call.stream});
}

template <class T, Precision precision, int... op>
void add_ops(OpTable& table, std::integer_sequence<int, op...>) {
  add_product_ops<T, ConvProducts<precision>>(table, Op::conv2d_fwd, {run<T, precision, op>...});
}

}  // namespace

template <class T, Precision precision>
void add_conv2d_ops(OpTable& table) {
  add_ops<T, precision>(table, std::make_integer_sequence<int, kProductOps>());
}
template void add_conv2d_ops<float, Precision::float32>(OpTable&);
template void add_conv2d_ops<float, Precision::tf32>(OpTable&);
template void add_conv2d_ops<float, Precision::tf32x3>(OpTable&);
template void add_conv2d_ops<float, Precision::bf16x3>(OpTable&);
template void add_conv2d_ops<double, Precision::float32>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
