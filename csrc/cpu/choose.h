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

// Side by side every number is as wide as a vector, so that layers of 32 and more are read from L2 where they were read from L1; and a
// group keeps one thread busy that might be sixteen tasks on two. Up to these sizes lanes were at least one and a half times as fast as
// tasks one after the other, with 8 and with 16 lanes: a gain that a half-filled group does not lose.
inline bool lanes_pay_off(const Program& net, int64_t examples) {
  constexpr int64_t kMostParams = 8192, kMostProducts = 65536;
  return net.param_count <= kMostParams && net.param_count * examples <= kMostProducts;
}

FASTMAML_CPU_END
