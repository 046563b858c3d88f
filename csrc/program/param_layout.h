// Parameters from torch's layout to the engine's and back. Kernels want weights with the output index last and contiguous:
//   linear [out, in] -> [in, out] (unless Linear::out_in)      conv2d [F, C, KH, KW] -> [KH, KW, C, F]      image affine [C, H, W] -> [H,
//   W, C]
// Offsets of tensors are the same in both, so any vector over the parameters (rates, gradients, tangents) is moved the same way.
#pragma once

#include "program/program.h"

namespace fastmaml {

// Numbers in one vector over these parameters, which follow each other without gaps.
int64_t size_of(const std::vector<Param>& params);

bool in_torch_order(const std::vector<Param>& params);

// count vectors; from and to must not overlap.
template <class T>
void params_from_torch(const std::vector<Param>& params, T* to, const T* from, int64_t count);
template <class T>
void params_to_torch(const std::vector<Param>& params, T* to, const T* from, int64_t count);

}  // namespace fastmaml
