// Launches kernels/map.cuh for an op whose operands come outputs first and then inputs, as program/op.h lists them.
#pragma once

#include <algorithm>

#include "cuda/kernels/map.cuh"
#include "cuda/launch.h"
#include "cuda/operands.h"

namespace fastmaml::FASTMAML_CUDA_NS {

struct Blocks {
  unsigned threads, count;  // of a task
};

template <class T>
Blocks blocks_of(int64_t size) {
  const int64_t chunks = (size + kChunk<T> - 1) / kChunk<T>, threads = std::clamp<int64_t>((chunks + 31) / 32 * 32, 32, 256);
  return {unsigned(threads), unsigned(std::min<int64_t>((chunks + threads - 1) / threads, 65535))};
}

template <class T, class F>
void launch_map(const Call& call, const F& f, const MapOperands<T, F>& operands, int64_t size) {
  check_sizes(op_name(call.step.op), {size});
  bool aligned = true;
  for (const PerTask<T>& out : operands.out) aligned = aligned && wide(out, 0);
  for (const PerTask<const T>& x : operands.x) aligned = aligned && wide(x, 0);
  const Blocks blocks = blocks_of<T>(size);
  if (size > 0)
    launch(map<T, F>, dim3(unsigned(call.tasks), blocks.count), dim3(blocks.threads), 0, call.stream, f, operands, int(size), aligned);
}

// f's outputs are the op's first operands, f's inputs those from `first_input` on: beside the outputs, or the same where it is 0.
template <class T, class F>
void run_map(const Call& call, const F& f, int64_t size, int first_input = F::kOut) {
  MapOperands<T, F> operands;
  for (int k = 0; k < F::kOut; ++k) operands.out[k] = operand<T>(call, k);
  for (int k = 0; k < F::kIn; ++k) operands.x[k] = operand<const T>(call, first_input + k);
  launch_map<T>(call, f, operands, size);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
