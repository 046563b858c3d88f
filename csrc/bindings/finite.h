// Whether numbers in host memory are finite.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmaml {

bool all_finite(const void* x, int64_t count, size_t real_bytes);  // float or double

}  // namespace fastmaml
