// Every op of program/op.h in float64 with plain loops. All other backends are tested against these functions.
// Operands come in the order of program/op.h. Formulas are in ALGORITHMS section 6, unless a line says otherwise.
#pragma once

#include "ops/ops.h"

namespace fastmaml::reference {

using Real = Elements<double>;
using Index = Elements<int32_t>;  // max_pool2d's argmax
using Label = Elements<int64_t>;  // classes
using Tap = Elements<int8_t>;     // norm_pool_act's argmax

// The elements of operand i for one task; null where the operand is absent.
inline Real real(const Call& call, int i, int64_t task) { return elements<double>(call[i], task); }

inline double value_or(const Real& x, int64_t i, double if_absent) { return x ? x[i] : if_absent; }

// d times the derivative of a rectifier (Rectified in layers.h, slope 0 or positive).
// y may be the rectifier's output or its argument, since both have the same sign. So rectified(y, y) is the rectifier itself.
// As in torch, NaN counts as positive for a ReLU.
inline double rectified(double slope, double y, double d) {
  if (y > 0 || (y != y && slope == 0)) return d;
  return slope == 0 ? 0.0 : slope * d;
}

inline void rectify(const Real& d, const Real& y, int64_t size, double slope) {
  for (int64_t i = 0; i < size; ++i) d[i] = rectified(slope, y[i], d[i]);
}

inline void fill(const Real& out, int64_t size, double value) {
  for (int64_t i = 0; i < size; ++i) out[i] = value;
}

// The same Step with other operands. A _dual op runs as its two halves.
inline Call with_operands(const Call& call, const View* operand) {
  return {call.step, call.layer, operand, call.tasks, call.scratch, call.stream};
}

#define X(name, ...) void name(const Call& call);
FASTMAML_OPS(X)
#undef X

void tree_add(void* a, const void* b, int64_t size);
void tree_reduce(void* out, void* x, const void* w, int64_t tasks, int64_t size, int64_t stride, uintptr_t stream);

}  // namespace fastmaml::reference
