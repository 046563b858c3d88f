// Calls a loss written in Python for all tasks at once (Run::python_loss).
#pragma once

#include <pybind11/pybind11.h>

#include "ops/ops.h"

namespace fastmaml {

// Sets this thread's function, or None. The same thread later calls the function, holding the interpreter's lock.
void set_python_loss(pybind11::object loss);

// Runs one Step caller_loss or caller_loss_jvp. real_bytes gives the arrays' type.
// `device` names a device's backend, else it is null. With a device the function gets a dict for each array:
// the array interface of device memory, to be read and written in place. The last argument is then the backend's name.
// An exception in Python becomes std::runtime_error.
void call_python_loss(const Call& call, size_t real_bytes, const char* device);

}  // namespace fastmaml
