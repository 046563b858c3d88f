// Encodes a Schedule for the resident walk (kernels/resident.cuh).
#pragma once

#include "cuda/device.h"
#include "ops/ops.h"

namespace fastmaml::FASTMAML_CUDA_NS {

bool has_resident(Op op);

// fast_bytes: shared memory of a block on the device.
template <class T>
ResidentCode resident_code(const Schedule& schedule, size_t fast_bytes);

// Shared memory for column sums and moments, after the slots; only if a Step needs them.
template <class T>
size_t resident_scratch_bytes();

}  // namespace fastmaml::FASTMAML_CUDA_NS
