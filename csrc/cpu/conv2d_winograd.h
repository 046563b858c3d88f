// 3x3 layers of conv2d by Winograd's F(2x2, 3x3) (kernels/winograd.h), and the helpers shared with conv2d.cpp.
#pragma once

#include "cpu/cpu.h"

FASTMAML_CPU_BEGIN

enum class ConvKind { forward, data, weight };

// One product: y from (x, w), or y_dot from (x_dot, w) and (x, w_dot).
template <class T>
struct ConvOutput {
  T* y;
  const T* bias;
  const T* w_for_x;  // null: no such term
  const T* w_for_x_dot;
};

// Does Winograd take this layer? Only 3x3 with stride 1, whole vectors of channels, and few output pixels beyond the last whole tile.
bool takes_winograd(const Conv2d& s);

template <class T>
size_t winograd_scratch(const Conv2d& s, ConvKind kind);
// The same functions as in conv2d.cpp.
template <class T>
void winograd_forward(const Conv2d& s, int64_t N, void* scratch, const T* x, const T* x_dot, const T* const* w,
                      const ConvOutput<T>* outputs, int n_outputs);
template <class T>
void winograd_backward_data(const Conv2d& s, int64_t N, void* scratch, T* dx, T* dx_dot, const T* dy, const T* dy_dot, const T* w,
                            const T* w_dot);
template <class T>
void winograd_backward_weight(const Conv2d& s, int64_t N, void* scratch, T* dw, const T* const* x, const T* const* dy, int n_terms);

FASTMAML_CPU_END
