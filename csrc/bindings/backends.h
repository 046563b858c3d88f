// The op tables by name. Most are in this module; the CUDA library is loaded on request.
#pragma once

#include <string>

#include "ops/ops.h"

namespace fastmaml {

// "cpu", "reference" (always float64), "cuda" or "cuda_emulated". The last two take a precision for products, as in "cuda:tf32".
const OpTable& table_named(const std::string& name, size_t real_bytes);

// Loads the shared library of the CUDA backend. Throws std::runtime_error with one sentence if it does not load,
// or if its sources differ from this module's.
void load_cuda(const std::string& path);
bool cuda_loaded();
// Launches an empty kernel. Throws std::runtime_error with one sentence if this machine cannot.
void try_cuda();

}  // namespace fastmaml
