// Makes and uses the gradient by a convolution's output a few images at a time, so that it stays in cache. For many large images.
// The Steps that make the gradient and the Steps that read it take turns.
//   norm_pool_act_bwd_data  dx of all images          norm_pool_act_bwd_data  dx of images 0, 1
//   conv2d_bwd_weight       dw from dx           =>   conv2d_bwd_weight       dw from this dx
//   conv2d_bwd_data         from dx                   conv2d_bwd_data         of images 0, 1;  then images 2, 3 ...
#pragma once

#include "program/schedule.h"

namespace fastmaml {

// Returns the same work, with the gradients by large images made and used a few images at a time.
struct StreamSizes {  // in numbers
  int64_t whole;      // a gradient of at most this size stays whole
  int64_t chunk;      // at least one image
};
Schedule stream(const Schedule& schedule, const StreamSizes& sizes);

}  // namespace fastmaml
