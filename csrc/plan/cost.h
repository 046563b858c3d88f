// The cost of a Step on paper: its arithmetic, and the bytes it must move. Knows ops and layers, but no machine.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "program/schedule.h"

namespace fastmaml {

struct Role {
  std::string_view name;
  bool optional;
};
std::vector<Role> roles(Op op);

// Numbers of one task's operand, by its role in op.h.
int64_t operand_size(const Layer& layer, std::string_view role, int64_t examples);
size_t operand_element_bytes(std::string_view role, size_t real_bytes);

// The cost of a Step for one task.
struct Cost {
  double products = 0;  // floating-point operations of matrix products and (direct) convolutions; a multiply-add is two
  double other = 0;     // all other operations, a few for each element; a call of exp or tanh counts as one
  double bytes = 0;     // every operand once, twice if it is read and written
};
Cost cost_of(const Step& step, const Layer& layer, size_t real_bytes);

// The sizes that decide the speed of a Step, for a model of the speed.
// Products: rows, depth, columns, and the width of the images. Other ops: number and length of their vectors.
std::vector<int64_t> sizes_of(const Step& step, const Layer& layer);

// "conv2d 64x14x14 to 64x14x14, 3x3": a Step's layer in words, with all sizes of its cost except the examples.
std::string words_of(const Layer& layer);

}  // namespace fastmaml
