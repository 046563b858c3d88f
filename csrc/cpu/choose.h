// Chooses the layout of tasks for a network. It must not see the number of tasks or threads: a task's bits must not depend on them.
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

// Lanes make every number a vector. Layers of 32 and more then come from L2 instead of L1.
// A group of tasks in lanes also keeps only one thread busy, where 16 single tasks would feed several threads.
// Up to these sizes lanes were at least 1.5 times as fast, with 8 and with 16 lanes. That outweighs a half-filled group.
inline bool lanes_pay_off(const Program& net, int64_t examples) {
  constexpr int64_t kMostParams = 8192, kMostProducts = 65536;
  return net.param_count <= kMostParams && net.param_count * examples <= kMostProducts;
}

FASTMAML_CPU_END
