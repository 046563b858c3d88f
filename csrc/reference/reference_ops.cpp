// The table of the reference backend.
#include "reference/reference.h"

namespace fastmaml {

const OpTable& reference_ops() {
  static const OpTable table = [] {
    OpTable t;
    t.backend = "reference";
    t.real_bytes = sizeof(double);
    t.lanes = kAnyLanes;
    t.rectifies = true;
#define X(name, ...) t.run[static_cast<int>(Op::name)] = reference::name;
    FASTMAML_OPS(X)
#undef X
    t.tree_reduce = reference::tree_reduce;
    t.tree_add = reference::tree_add;
    return t;
  }();
  return table;
}

}  // namespace fastmaml
