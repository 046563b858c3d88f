// Weight gradients of linear layers that apply the update themselves, so that the gradient is not written to memory and read again:
//   linear_bwd_weight      g's w, b           linear_update   phi_next's w, b                  for every layer
//   uniform_update  phi_next phi g rate   =>
//   linear_bwd_weight_jvp  hu's w, b          linear_adjoint  lambda's w, b, in place          if no Step between reads them
//   axpy            lambda -rate hu       =>  axpy            of the other parameters
#pragma once

#include <functional>

#include "program/schedule.h"

namespace fastmaml {

// Returns the same work. Where supported, weight gradients of linear layers make plain descent's updates and their
// adjoints.
Schedule fuse_updates(Schedule schedule, const std::function<bool(Op)>& supports);

}  // namespace fastmaml
