// Launches kernels/map.cuh for the ops of map_ops.h.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/map_ops.h"
#include "cuda/operands.h"

namespace fastmaml::FASTMAML_CUDA_NS {

struct Blocks {
  unsigned threads, count;  // for one task
};

template <class T>
Blocks blocks_of(int64_t size) {
  const int64_t chunks = (size + kChunk<T> - 1) / kChunk<T>, threads = std::clamp<int64_t>((chunks + 31) / 32 * 32, 32, 256);
  return {unsigned(threads), unsigned(std::min<int64_t>((chunks + threads - 1) / threads, 65535))};
}

template <class T, class F, int... outs, int... ins>
MapOperands<T, F> map_operands(const Call& call, At<outs...>, At<ins...>) {
  return {{operand<T>(call, outs)...}, {operand<const T>(call, ins)...}};
}

// Map: a MapOf of map_ops.h
template <class Map>
void run_map(const Call& call) {
  using T = typename Map::T;
  using F = typename Map::Function;
  const int64_t size = map_size(call.step, call.layer);
  check_sizes(op_name(call.step.op), {size});
  if (size == 0) return;
  const MapOperands<T, F> operands = map_operands<T, F>(call, typename Map::Outs(), typename Map::Ins());
  bool aligned = true;
  for (const PerTask<T>& out : operands.out) aligned = aligned && wide(out, 0);
  for (const PerTask<const T>& x : operands.x) aligned = aligned && wide(x, 0);
  const Blocks blocks = blocks_of<T>(size);
  const dim3 grid(unsigned(call.tasks), blocks.count), block(blocks.threads);
  if constexpr (Map::kNumber < 0)
    launch(map<T, F>, grid, block, 0, call.stream, Map::function(call.layer), operands, int(size), aligned);
  else
    launch(map_with_number<T, F>, grid, block, 0, call.stream, Map::function(call.layer), operands, operand<const T>(call, Map::kNumber),
           int(size), aligned);
}

template <class T, Op op>
void set_map(OpTable& table) {
  set_op(table, op, run_map<MapOp<T, op>>);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
