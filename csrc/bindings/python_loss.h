// A loss written in Python, for all tasks at once: what Run::python_loss does.
#pragma once

#include <pybind11/pybind11.h>

#include "ops/ops.h"

namespace fastmaml {

// The function for the calls of this thread, or None. It is called by the thread that set it, and holds the interpreter's lock then.
void set_python_loss(pybind11::object loss);

// One Step caller_loss or caller_loss_jvp; real_bytes says the arrays' type. For a device's backend, which is named then, the function gets
// a dict for each array, the array interface of memory that it reads and writes in place, and the backend's name behind them.
// What Python raises arrives as std::runtime_error.
void call_python_loss(const Call& call, size_t real_bytes, const char* device);

}  // namespace fastmaml
