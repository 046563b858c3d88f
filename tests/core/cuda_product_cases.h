// Sizes of linear and conv2d for test_cuda_linear, test_cuda_conv2d and test_cuda_tensor, and their ops: odd ones, tiles one short and one
// over, and what makes choose.h take each of its ways.
#pragma once

#include <initializer_list>
#include <variant>
#include <vector>

#include "cuda_op_checks.h"
#include "program/layers.h"
#include "program/op.h"

namespace fastmaml {

struct ProductCase {
  Layer layer;
  int64_t N, tasks;
};

// [N, H, W, C] to F filters of size kernel.
inline ProductCase conv(int64_t tasks, int64_t N, int64_t H, int64_t W, int64_t C, int64_t F, int64_t KH, int64_t KW, int64_t stride_h,
                        int64_t stride_w, int64_t pad_h, int64_t pad_w) {
  const int64_t OH = (H + 2 * pad_h - KH) / stride_h + 1, OW = (W + 2 * pad_w - KW) / stride_w + 1;
  return {Conv2d{C, H, W, F, OH, OW, KH, KW, stride_h, stride_w, pad_h, pad_w}, N, tasks};
}

inline ProductCase rectified(ProductCase c, const Rectified& y, const Rectified& x) {
  if (auto* s = std::get_if<Linear>(&c.layer)) s->y = y, s->x = x;
  if (auto* s = std::get_if<Conv2d>(&c.layer)) s->y = y, s->x = x;
  return c;
}

// From 1024 rows on choose.h takes larger tiles, and cuts the sums of weight gradients in parts.
inline std::vector<ProductCase> large_product_cases() {
  return {
      {Linear{36, 40}, 1025, 2},                     // large tiles
      {Linear{33, 34}, 1026, 1},                     // and without chunks
      {Linear{36, 32}, 1040, 1},                     // medium tiles
      {Linear{3, 31}, 1153, 1},                      // and without chunks
      {Linear{2, 3}, 1563, 5},                       // more tasks than share the scratch
      conv(1, 5, 15, 14, 4, 36, 3, 3, 1, 1, 1, 1),   // large tiles
      conv(1, 5, 16, 15, 33, 34, 1, 2, 1, 1, 0, 0),  // and without chunks
      conv(1, 6, 14, 13, 4, 32, 3, 3, 1, 1, 1, 1),   // medium tiles
      conv(1, 7, 13, 13, 37, 5, 1, 2, 1, 1, 0, 0),   // and without chunks
      conv(1, 5, 17, 15, 36, 4, 3, 3, 2, 2, 1, 1),   // large tiles in phases
      conv(1, 5, 16, 16, 1, 3, 3, 3, 1, 1, 1, 1),    // a long sum of small tiles
  };
}

inline std::vector<ProductCase> small_product_cases() {
  return {
      {Linear{1, 1}, 1, 1},
      {Linear{3, 2}, 5, 3},
      {Linear{5, 31}, 33, 2},
      {Linear{31, 33}, 2, 2},
      {Linear{32, 32}, 32, 1},
      {Linear{33, 65}, 31, 2},
      {Linear{40, 40}, 10, 3},
      {Linear{65, 5}, 65, 2},
      conv(2, 2, 5, 4, 3, 5, 3, 3, 1, 1, 1, 1),      //
      conv(3, 1, 7, 7, 1, 4, 3, 3, 1, 1, 1, 1),      // one channel
      conv(2, 3, 6, 5, 4, 8, 3, 3, 1, 1, 0, 0),      // no padding
      conv(2, 2, 7, 6, 4, 33, 3, 3, 2, 2, 1, 1),     // phases
      conv(1, 2, 9, 8, 5, 3, 3, 3, 2, 2, 0, 1),      //
      conv(2, 2, 5, 5, 8, 4, 1, 1, 1, 1, 0, 0),      // a linear layer on pixels
      conv(2, 3, 5, 5, 4, 4, 1, 1, 2, 2, 0, 0),      // pixels that no tap reaches
      conv(1, 2, 4, 5, 3, 3, 1, 1, 1, 1, 1, 1),      //
      conv(2, 1, 8, 9, 2, 3, 5, 2, 3, 1, 2, 0),      // another size, stride and padding each way
      conv(1, 1, 4, 4, 3, 2, 4, 4, 1, 1, 0, 0),      // one output pixel
      conv(1, 2, 1, 1, 5, 6, 3, 3, 1, 1, 1, 1),      // one input pixel
      conv(1, 1, 2, 3, 65, 31, 3, 3, 1, 1, 1, 1),    //
      conv(1, 1, 7, 3, 2, 2, 2, 2, 5, 4, 1, 1),      // strides beyond the kernel
      {Linear{36, 40}, 257, 2},                      // half tiles
      {Linear{34, 35}, 300, 1},                      // and without chunks
      {Linear{64, 36}, 5, 3},                        // flat tiles
      conv(1, 2, 12, 11, 36, 34, 1, 2, 1, 1, 0, 0),  //
      conv(1, 2, 12, 12, 33, 36, 2, 1, 1, 1, 1, 0),  //
  };
}

// With rectifiers on both sides, ReLU and leaky ReLU in turn. An epilogue does not care how long a sum is, only which tile takes it.
inline std::vector<ProductCase> large_rectified_cases() {
  return {
      {Linear{36, 40, {true, 0}, {true, 0.3}}, 1025, 2},                                // large tiles
      {Linear{33, 34, {true, 0.2}, {true, 0}}, 1026, 1},                                // and without chunks
      {Linear{36, 32, {true, 0.2}, {true, 0}}, 1040, 1},                                // medium tiles
      rectified(conv(1, 5, 15, 14, 36, 36, 1, 2, 1, 1, 0, 0), {true, 0}, {true, 0.3}),  // large tiles
      rectified(conv(1, 5, 16, 15, 33, 34, 1, 2, 1, 1, 0, 0), {true, 0.2}, {true, 0}),  // and without chunks
      rectified(conv(1, 6, 14, 13, 4, 32, 2, 1, 1, 1, 0, 0), {true, 0.2}, {true, 0}),   // medium tiles
      rectified(conv(1, 5, 17, 15, 36, 4, 2, 1, 2, 2, 0, 0), {true, 0}, {true, 0.3}),   // large tiles in phases
  };
}

inline std::vector<ProductCase> rectified_cases() {
  std::vector<ProductCase> cases = large_rectified_cases();
  bool leaky = false;
  for (const ProductCase& c : small_product_cases()) {
    leaky = !leaky;
    cases.push_back(rectified(c, {true, leaky ? 0.2 : 0.0}, {true, leaky ? 0.0 : 0.3}));
  }
  return cases;
}

inline constexpr std::initializer_list<Op> kLinearOps = {Op::linear_fwd,        Op::linear_fwd_jvp,       Op::linear_fwd_dual,
                                                         Op::linear_bwd_data,   Op::linear_bwd_data_jvp,  Op::linear_bwd_data_dual,
                                                         Op::linear_bwd_weight, Op::linear_bwd_weight_jvp};
inline constexpr std::initializer_list<Op> kConvOps = {Op::conv2d_fwd,        Op::conv2d_fwd_jvp,       Op::conv2d_fwd_dual,
                                                       Op::conv2d_bwd_data,   Op::conv2d_bwd_data_jvp,  Op::conv2d_bwd_data_dual,
                                                       Op::conv2d_bwd_weight, Op::conv2d_bwd_weight_jvp};

inline constexpr std::initializer_list<Op> kRectifiedLinearOps = {Op::linear_fwd,      Op::linear_fwd_jvp,      Op::linear_fwd_dual,
                                                                  Op::linear_bwd_data, Op::linear_bwd_data_jvp, Op::linear_bwd_data_dual};
inline constexpr std::initializer_list<Op> kRectifiedConvOps = {Op::conv2d_fwd,      Op::conv2d_fwd_jvp,      Op::conv2d_fwd_dual,
                                                                Op::conv2d_bwd_data, Op::conv2d_bwd_data_jvp, Op::conv2d_bwd_data_dual};

inline const std::initializer_list<Op>& ops_of(const ProductCase& c) {
  const bool linear = std::holds_alternative<Linear>(c.layer);
  if (rectified_output(c.layer).on) return linear ? kRectifiedLinearOps : kRectifiedConvOps;
  return linear ? kLinearOps : kConvOps;
}

// Those of linear, or of conv2d.
inline void check_products(bool (*chosen)(Op)) {
  for (const auto& cases : {large_product_cases(), small_product_cases(), rectified_cases()})
    for (const ProductCase& c : cases)
      if (chosen(*ops_of(c).begin())) check_ops(ops_of(c), c.layer, c.N, c.tasks);
}

}  // namespace fastmaml
