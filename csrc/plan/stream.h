// A gradient by the output of a convolution, of many large images, is made and used up a few images at a time, so that it never leaves the
// cache: the Steps that make it and those that read it take turns.
//   norm_pool_act_bwd_data  dx of all images          norm_pool_act_bwd_data  dx of images 0, 1
//   conv2d_bwd_weight       dw from dx           =>   conv2d_bwd_weight       dw from it
//   conv2d_bwd_data         from dx                   conv2d_bwd_data         of images 0, 1;  then images 2, 3 ...
#pragma once

#include "program/schedule.h"

namespace fastmaml {

// The same work with the gradients by large images made and used up a few images at a time.
struct StreamSizes {  // in numbers
  int64_t whole;      // a gradient of at most that many stays as it is
  int64_t chunk;      // at least one image
};
Schedule stream(const Schedule& schedule, const StreamSizes& sizes);

}  // namespace fastmaml
