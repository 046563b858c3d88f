// Memory of large results on the host. When a result's last tensor is freed, its memory waits for the next call.
// malloc would give such blocks back to the system. The page faults of fresh pages took a third of a Hessian-vector product.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastmaml {

// Uninitialised and contiguous. Small tensors come from torch's allocator; so do all in torch 2.10, which has no
// callback for freed tensors.
torch::stable::Tensor empty_on_host(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type);  // Float or Double

void release_results();  // gives memory without tensors back to the system

}  // namespace fastmaml
