// The op tables by name: those of this module, and that of the CUDA library, which is loaded where one is wanted.
#pragma once

#include <string>

#include "ops/ops.h"

namespace fastmaml {

// "cpu", "reference" (always float64), "cuda", "cuda_emulated"; the last two also as "cuda:tf32", with products at another precision.
const OpTable& table_named(const std::string& name, size_t real_bytes);

// Loads the shared library of the CUDA backend. Throws std::runtime_error with one sentence where it does not load or was built from
// other sources than this module.
void load_cuda(const std::string& path);
bool cuda_loaded();
// Launches a kernel that does nothing. Throws std::runtime_error with one sentence where this machine cannot.
void try_cuda();

}  // namespace fastmaml
