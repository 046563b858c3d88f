// A loss that a Python function computes, for all tasks at once: what Run::caller does with numpy arrays.
#pragma once

#include <pybind11/pybind11.h>

#include "ops/ops.h"

namespace fastmaml {

// The function for the calls of this thread, or None. It is called by the thread that set it, and holds the interpreter's lock then.
void set_callers_loss(pybind11::object loss);

// One Step caller_loss or caller_loss_jvp; real_bytes says the arrays' type. What Python raises arrives as std::runtime_error.
void call_callers_loss(const Call& call, size_t real_bytes);

}  // namespace fastmaml
