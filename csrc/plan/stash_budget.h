// How much memory the activations of inner steps may take before memory="auto" computes them again: the one place that decides.
#pragma once

#include <cstddef>

#include "ops/ops.h"

namespace fastmaml {

// Bytes of one arena: of a worker on the host, of a task on a device. at_once: the tasks meet at a loss written in Python, and all their
// arenas are in memory. A stash never changes a result's bits, and keeping took less work than computing again wherever it was measured
// (csrc/DECISIONS.md), so memory alone decides.
size_t stash_budget(const OpTable& table, bool at_once);

size_t machine_memory();  // bytes that this process may have: the machine's, or its control group's limit

}  // namespace fastmaml
