// A flat vector of parameters and its parts, one for each parameter of a module.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastmaml {

// Joins parts of one type in host memory into [P].
torch::stable::Tensor concatenated(const std::vector<torch::stable::Tensor>& parts);

// Splits flat [P] times scale [] into new tensors in host memory. shapes: for each part its number of dimensions, then the dimensions.
std::vector<torch::stable::Tensor> scaled_parts_call(const torch::stable::Tensor& flat, const torch::stable::Tensor& scale,
                                                     const std::vector<int64_t>& shapes);

}  // namespace fastmaml
