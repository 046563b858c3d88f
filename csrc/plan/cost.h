// What a Step costs on paper: its arithmetic, and the bytes that it cannot do without. Knows ops and layers, and no machine.
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

// Of an operand of one task, by its role in op.h.
int64_t operand_size(const Layer& layer, std::string_view role, int64_t examples);
size_t operand_element_bytes(std::string_view role, size_t real_bytes);

// Of one task.
struct Cost {
  double products = 0;  // floating-point operations of matrix products and (direct) convolutions; a multiply-add is two
  double other = 0;     // of everything else, by counting a few for each element; a call of exp or tanh is one
  double bytes = 0;     // every operand once, twice where it is read and written
};
Cost cost_of(const Step& step, const Layer& layer, size_t real_bytes);

// What the speed of a Step depends on beside the op, for a model of it: rows, depth and columns of a product, and the width of the images;
// of other ops how often they do their arithmetic, and the length of the vectors they do it in.
std::vector<int64_t> sizes_of(const Step& step, const Layer& layer);

// "conv2d 64x14x14 to 64x14x14, 3x3": the layer of a Step in words, with all sizes that its cost depends on beside the examples.
std::string words_of(const Layer& layer);

}  // namespace fastmaml
