// Fuses layers, and Steps of the sweep, that touch the same numbers, where the backend has the fused ops.
#pragma once

#include <functional>

#include "program/program.h"
#include "program/schedule.h"

namespace fastmaml {

struct Capabilities {  // of a backend
  std::function<bool(Op)> supports;
  bool rectifies;       // its linear, conv2d and group_norm take in a rectifier (Rectified in layers.h)
  bool out_in = false;  // its linear layers read weights as torch has them (Linear::out_in)
};

// The same network with the weights of linear layers in torch's order.
Program with_torch_weights(const Program& net);

// The network as the backend runs it. with_torch_weights applies if the backend reads torch's order.
// Batch norm -> [max-pool] -> ReLU or leaky ReLU becomes one norm_pool_act, if no other layer reads the parts.
// Other ReLUs and leaky ReLUs join the layers around them where possible.
Program fuse(const Program& net, const Capabilities& backend);

// The same work with fewer Steps, where `supports` has the fused op. Neighbouring parts of an sgd_adjoint become one Step.
// A pointwise function and its tangent become the function's dual.
Schedule fuse(Schedule schedule, const std::function<bool(Op)>& supports);

}  // namespace fastmaml
