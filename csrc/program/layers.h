// Layers as small structs of sizes; one example each. Nothing here knows how they are computed.
#pragma once

#include <cstdint>
#include <variant>

namespace fastmaml {

// ReLU (slope 0) or leaky ReLU (slope > 0) as a part of the layer beside it: plan/fuse.cpp.
struct Rectified {
  bool on = false;
  double slope = 0;
};

struct Linear {
  int64_t in, out;
  Rectified y = {};     // what the layer makes is rectified
  Rectified x = {};     // x comes out of a rectifier, and the layer's backward pass goes on through it
  bool out_in = false;  // w and its gradient are [out, in], as torch has them, and not [in, out]
};

struct Conv2d {
  int64_t C, H, W;    // input image
  int64_t F, OH, OW;  // output image
  int64_t KH, KW;     // kernel
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  Rectified y = {}, x = {};  // as in Linear
};

struct BatchNorm {
  int64_t C, spatial;  // spatial = H W, or 1 for vectors
  double eps;
  bool frozen;  // running statistics: constants, no gradient flows through them
};

// Layer norm is group norm with one group over `channels` = all features and spatial = 1.
struct GroupNorm {
  int64_t channels, spatial, groups;
  double eps;
  Rectified y = {};
};

struct Pointwise {
  enum class Kind : uint8_t { relu, leaky_relu, tanh, sigmoid, gelu, gelu_tanh, silu };
  Kind kind;
  double slope;  // leaky_relu only
  int64_t size;
};

struct Pool2d {  // max_pool2d and avg_pool2d
  int64_t C, H, W, OH, OW;
  int64_t KH, KW, stride_h, stride_w, pad_h, pad_w;
  bool count_include_pad;  // avg_pool2d only
};

// Batch norm, max-pool (where `pooled`; else each pixel is its own window), then ReLU (slope 0) or leaky ReLU (slope > 0) in one layer:
// plan/fuse.cpp.
struct NormPoolAct {
  BatchNorm norm;
  Pool2d pool;
  bool pooled;
  double slope;
};

struct Flatten {  // [H, W, C] -> [C H W], torch's order
  int64_t C, H, W;
};

struct Add {
  int64_t size;
};

struct Loss {
  enum class Kind : uint8_t { none, cross_entropy, mse, caller };
  Kind kind;
  int64_t size;      // classes, or outputs per example
  double smoothing;  // cross_entropy: target = (1 - smoothing) onehot + smoothing / classes
};

struct PythonLoss {  // a loss written in Python: what it must know beside the network's output
  int64_t C, H, W;   // the output, as an image or a vector
  bool image;
  bool query;         // of the query set, or of the support set
  int64_t first_row;  // of the set; the rows of a mini-batch start there
};

struct Vector {  // ops on flat vectors: copy, add, updates
  int64_t size;
};

struct Axpy {
  int64_t size;
  double factor;
};

struct Clip {  // by value or by norm
  int64_t size;
  double limit;
};

struct Momentum {
  int64_t size;
  double momentum, dampening;
  bool nesterov;
  bool first;  // there is no b before this step: b_next = g
};

struct Adam {
  int64_t size;
  double beta1, beta2, eps;
  double decay;  // decoupled weight decay
  int64_t step;  // steps before this one, for the bias correction
};

using Layer = std::variant<Vector, Linear, Conv2d, BatchNorm, GroupNorm, Pointwise, Pool2d, NormPoolAct, Flatten, Add, Loss, PythonLoss,
                           Axpy, Clip, Momentum, Adam>;

inline Rectified rectified_output(const Layer& layer) {
  if (const auto* s = std::get_if<Linear>(&layer)) return s->y;
  if (const auto* s = std::get_if<Conv2d>(&layer)) return s->y;
  if (const auto* s = std::get_if<GroupNorm>(&layer)) return s->y;
  return {};
}

inline Rectified rectified_input(const Layer& layer) {
  if (const auto* s = std::get_if<Linear>(&layer)) return s->x;
  if (const auto* s = std::get_if<Conv2d>(&layer)) return s->x;
  return {};
}

}  // namespace fastmaml
