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

template <class T>
bool lanes_pay(const Program& net, int64_t /* examples */) {
  return net.param_count < 20000;
}

FASTMAML_CPU_END
