// Layers as small structs of sizes; one example each. Nothing here knows how they are computed.
#pragma once

#include <cstdint>
#include <variant>

#include "program/pointwise.h"

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
  enum class Kind : uint8_t {
#define X(name, key) name,
    FASTMAML_POINTWISE(X)
#undef X
  };
  Kind kind;
  double number;  // the one that the list names
  int64_t size;
};

inline constexpr Pointwise::Kind kPointwise[] = {
#define X(name, key) Pointwise::Kind::name,
    FASTMAML_POINTWISE(X)
#undef X
};

constexpr bool is_rectifier(Pointwise::Kind kind) {
  return false
#define X(name, key) || kind == Pointwise::Kind::name
      FASTMAML_RECTIFIERS(X)
#undef X
          ;
}

constexpr const char* pointwise_name(Pointwise::Kind kind) {
  constexpr const char* names[] = {
#define X(name, key) #name,
      FASTMAML_POINTWISE(X)
#undef X
  };
  return names[static_cast<int>(kind)];
}

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

// What a loss compares an example's output with: one label, a row of numbers like the output, or nothing that the engine knows of.
enum class Target : uint8_t { label, row, nothing };

// The losses: the word in a program's text, the key of the one number that may follow it there (else ""), and the target.
#define FASTMAML_LOSSES(X)             \
  X(none, "", row)                     \
  X(cross_entropy, "smoothing", label) \
  X(mse, "", row)                      \
  X(caller, "", nothing)

struct Loss {
  enum class Kind : uint8_t {
#define X(name, key, target) name,
    FASTMAML_LOSSES(X)
#undef X
  };
  Kind kind;
  int64_t size;      // classes, or outputs per example
  double smoothing;  // cross_entropy: target = (1 - smoothing) onehot + smoothing / classes
};

constexpr Target target_of(Loss::Kind kind) {
  constexpr Target targets[] = {
#define X(name, key, target) Target::target,
      FASTMAML_LOSSES(X)
#undef X
  };
  return targets[static_cast<int>(kind)];
}

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
