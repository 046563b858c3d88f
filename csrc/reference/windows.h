// The windows of a pool, for pool2d and norm_pool_act.
#pragma once

#include "reference/reference.h"

namespace fastmaml::reference {

// Calls body(out, oh, ow, x_of) for every output element. `out` is the offset of y[n, oh, ow, c].
// x_of(kh, kw) is the offset of the x under a tap, or -1 in the padding.
template <class Body>
void for_each_window(int64_t N, const Pool2d& shape, Body body) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t oh = 0; oh < shape.OH; ++oh)
      for (int64_t ow = 0; ow < shape.OW; ++ow)
        for (int64_t c = 0; c < shape.C; ++c) {
          auto x_of = [=](int64_t kh, int64_t kw) -> int64_t {
            const int64_t h = oh * shape.stride_h + kh - shape.pad_h, w = ow * shape.stride_w + kw - shape.pad_w;
            if (h < 0 || h >= shape.H || w < 0 || w >= shape.W) return -1;
            return ((n * shape.H + h) * shape.W + w) * shape.C + c;
          };
          body(((n * shape.OH + oh) * shape.OW + ow) * shape.C + c, oh, ow, x_of);
        }
}

}  // namespace fastmaml::reference
