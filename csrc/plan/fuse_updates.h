// Updates that are made by the products they read, so that no gradient is written and read again:
//   linear_bwd_weight      g's w, b           linear_update   phi_next's w, b                  for every layer
//   uniform_update  phi_next phi g rate   =>
//   linear_bwd_weight_jvp  hu's w, b          linear_adjoint  lambda's w, b, in place          where nobody reads them in between
//   axpy            lambda -rate hu       =>  axpy            of the others
#pragma once

#include <functional>

#include "program/schedule.h"

namespace fastmaml {

// The same work with plain descent's updates, and their adjoints in the sweep, made by the weight gradients of linear layers, where they
// are supported.
Schedule fuse_updates(Schedule schedule, const std::function<bool(Op)>& supports);

}  // namespace fastmaml
