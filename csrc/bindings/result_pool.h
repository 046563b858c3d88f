// Memory of large results on the host. When the last tensor over it is gone it stays for the next call's: malloc gives such blocks back to
// the system and takes them anew, and the faults of fresh pages took a third of a Hessian-vector product.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace fastmaml {

// Uninitialised and contiguous. From torch's allocator where it is small, or where torch (2.10) cannot call back when it is gone.
torch::stable::Tensor empty_on_host(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type);  // Float or Double

void release_results();  // what no tensor uses, back to the system

}  // namespace fastmaml
