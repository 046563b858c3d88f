// The pointwise functions, one row each: the word in a program's text, and the key of the one number that may follow it there (else "").
// What knows all functions is made from these lists, and does not compile before it has the formulas of every one. Macros alone: kernels
// read them too.
#pragma once

// Lines on both sides of 0: they have no second derivative, and the layers beside them can take them in (Rectified in layers.h).
#define FASTMAML_RECTIFIERS(X) \
  X(relu, "")                  \
  X(leaky_relu, "slope")

#define FASTMAML_SMOOTH(X) \
  X(tanh, "")              \
  X(sigmoid, "")           \
  X(gelu, "")              \
  X(gelu_tanh, "")         \
  X(silu, "")              \
  X(elu, "alpha")

#define FASTMAML_POINTWISE(X) FASTMAML_RECTIFIERS(X) FASTMAML_SMOOTH(X)
