// A Program: what a network computes. Parsed from the text that fastmaml/network.py writes; nodes are in topological order.
#pragma once

#include <string>
#include <vector>

#include "program/layers.h"
#include "program/op.h"

namespace fastmaml {

struct Shape {  // of one example: an image C H W (stored [H, W, C]) or a vector D (H = W = 1, image = false)
  int64_t C = 1, H = 1, W = 1;
  bool image = false;
  int64_t size() const { return C * H * W; }
};

struct Param {
  int64_t offset;             // in theta, the same in torch's and in the engine's order
  std::vector<int64_t> dims;  // torch's shape
  int64_t size;
  enum class Order { torch, linear, conv2d, image };  // how the engine stores it, see param_layout.h
  Order order = Order::torch;
};

struct Buffer {
  int64_t offset, size;
};

#define FASTMAML_NODES(X) \
  X(linear)               \
  X(conv2d)               \
  X(batch_norm)           \
  X(group_norm)           \
  X(pointwise)            \
  X(max_pool2d)           \
  X(avg_pool2d)           \
  X(norm_pool_act)        \
  X(flatten)              \
  X(add)

enum class NodeKind {
#define X(name) name,
  FASTMAML_NODES(X)
#undef X
};

struct Node {
  NodeKind kind;
  Layer layer;
  std::vector<int> inputs;     // values
  int weight = -1, bias = -1;  // params
  int mean = -1, var = -1;     // buffers
  bool support_stats = false;  // batch norm in `support` mode: the query is normalised with the support set's statistics
};

struct Program {
  std::vector<Param> params;
  std::vector<Buffer> buffers;
  std::vector<Shape> values;  // values[0] is the input, values[i + 1] is made by nodes[i]
  std::vector<Node> nodes;
  int output = 0;
  Loss loss{Loss::Kind::none, 0, 0.0};
  int64_t param_count = 0;
  int64_t buffer_count = 0;

  const Shape& input_shape() const { return values[0]; }
  const Shape& output_shape() const { return values[output]; }
  bool uses_support_stats() const;

  // Throws std::invalid_argument with one sentence that quotes the offending line.
  static Program parse(const std::string& text);
};

std::string to_string(const Program& program);

}  // namespace fastmaml
