// The parts of a flat vector, one for each parameter of a module.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastmaml {

// Parts of one type in host memory, one after the other: [P].
torch::stable::Tensor concatenated(const std::vector<torch::stable::Tensor>& parts);

// flat [P] times scale [], in host memory, as tensors with memory of their own. shapes: for each part its number of dimensions, then these.
std::vector<torch::stable::Tensor> scaled_parts_call(const torch::stable::Tensor& flat, const torch::stable::Tensor& scale,
                                                     const std::vector<int64_t>& shapes);

}  // namespace fastmaml
