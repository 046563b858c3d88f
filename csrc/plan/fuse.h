// Layers, and Steps of the sweep, that touch the same numbers become one, where the backend has the ops for it.
#pragma once

#include <functional>

#include "program/program.h"
#include "program/schedule.h"

namespace fastmaml {

struct Capabilities {  // of a backend
  std::function<bool(Op)> supports;
  bool rectifies;       // its linear, conv2d and group_norm take a rectifier in (Rectified in layers.h)
  bool out_in = false;  // its linear layers read weights as torch has them (Linear::out_in)
};

// The same network with the weights of linear layers in torch's order.
Program with_torch_weights(const Program& net);

// The same network as the backend runs it: with_torch_weights where it reads them, and with fewer layers where it is able to. A
// norm_pool_act for every batch norm -> [max-pool] -> ReLU or leaky ReLU of which nobody else sees the parts, and no ReLU or leaky ReLU of
// its own where the layers beside it take it in.
Program fuse(const Program& net, const Capabilities& backend);

// The same work with an sgd_adjoint for its parts where they follow each other, and a pointwise function's dual for it and its tangent,
// where they are supported.
Schedule fuse(Schedule schedule, const std::function<bool(Op)>& supports);

}  // namespace fastmaml
