// flatten: an image [H, W, C] becomes a vector [C H W], in torch's order. Tangents use the same backward op.
#include "reference/reference.h"

namespace fastmaml::reference {

namespace {

// body(i, j): element i of the images [N, H, W, C] is element j of the vectors [N, C H W].
template <class Body>
void for_each_element(int64_t N, const Flatten& shape, Body body) {
  const int64_t C = shape.C, H = shape.H, W = shape.W;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t w = 0; w < W; ++w)
        for (int64_t c = 0; c < C; ++c) body(((n * H + h) * W + w) * C + c, ((n * C + c) * H + h) * W + w);
}

}  // namespace

// y[n, c, h, w] = x[n, h, w, c]
void flatten_fwd(const Call& call) {
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real y = real(call, 0, task), x = real(call, 1, task);
    for_each_element(call.step.examples, call.shape<Flatten>(), [&](int64_t i, int64_t j) { y[j] = x[i]; });
  }
}

// dx[n, h, w, c] = dy[n, c, h, w]
void flatten_bwd(const Call& call) {
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real dx = real(call, 0, task), dy = real(call, 1, task);
    for_each_element(call.step.examples, call.shape<Flatten>(), [&](int64_t i, int64_t j) { dx[i] = dy[j]; });
  }
}

}  // namespace fastmaml::reference
