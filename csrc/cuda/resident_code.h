// A Schedule as the resident walk reads it (kernels/resident.cuh).
#pragma once

#include "cuda/device.h"
#include "ops/ops.h"

namespace fastmaml::FASTMAML_CUDA_NS {

bool has_resident(Op op);

// fast_bytes: the shared memory that the device gives a block.
template <class T>
ResidentCode resident_code(const Schedule& schedule, size_t fast_bytes);

// What column sums and moments take of the shared memory, behind the slots, where there are any.
template <class T>
size_t resident_scratch_bytes();

}  // namespace fastmaml::FASTMAML_CUDA_NS
