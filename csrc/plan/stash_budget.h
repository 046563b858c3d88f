// How much memory the inner steps' activations may take. Above this, memory="auto" recomputes them. No other place
// decides this.
#pragma once

#include <cstddef>

#include "ops/ops.h"

namespace fastmaml {

// Bytes of one arena: for a worker on the host, for a task on a device.
// at_once: tasks meet at a loss written in Python, so all arenas are in memory.
// A stash never changes a result's bits. Wherever measured, a stash was less work than recomputing (csrc/DECISIONS.md).
// So memory alone decides.
size_t stash_budget(const OpTable& table, bool at_once);

size_t machine_memory();  // bytes available to this process: the machine's memory, or its control group's limit

}  // namespace fastmaml
