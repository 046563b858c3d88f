// Which layout of tasks a network takes. Not told of tasks or threads: a task's bits must not depend on them.
#pragma once

#include "cpu/cpu.h"
#include "program/program.h"

FASTMAML_CPU_BEGIN

// The layers that cpu/lanes/ has.
inline bool has_lanes(const Node& node) {
  switch (node.kind) {
    case NodeKind::linear:
    case NodeKind::group_norm:
    case NodeKind::pointwise:
    case NodeKind::flatten:
    case NodeKind::add:
      return true;
    default:
      return false;
  }
}

inline bool lanes_run(const Program& net) {
  if (net.loss.kind == Loss::Kind::caller) return false;
  for (const Node& node : net.nodes)
    if (!has_lanes(node)) return false;
  return true;
}

// Side by side every number is as wide as a vector, and is read from L2 where it was read from L1. Measured with 8 and 16 lanes
// (bench/README.md): up to these sizes that costs less than rows which do not fill whole vectors.
inline bool lanes_pay(const Program& net, int64_t examples) {
  constexpr int64_t kMostParams = 8192, kMostNumbers = 10000;
  int64_t numbers = 0;  // of one example, in all layers
  for (const Shape& value : net.values) numbers += value.size();
  return net.param_count <= kMostParams && examples * numbers <= kMostNumbers;
}

FASTMAML_CPU_END
