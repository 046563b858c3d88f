// Flat vectors: fill_zero, copy, add; and flatten, which only reorders.
#include "cuda/cuda_ops.h"
#include "cuda/kernels/vector.cuh"
#include "cuda/map.h"

namespace fastmaml::FASTMAML_CUDA_NS {
namespace {

// out [N, cols, rows] = x [N, rows, cols]
template <class T>
void run_transpose(const Call& call, int64_t rows, int64_t cols) {
  constexpr int kThreads = 256;
  const int64_t N = call.step.examples;
  check_sizes("flatten", {N * rows * cols});
  const int64_t tiles = N * ((rows + kTransposeRows - 1) / kTransposeRows) * ((cols + kTransposeCols - 1) / kTransposeCols);
  launch(transpose<T, kThreads>, dim3(unsigned(call.tasks), unsigned(std::min<int64_t>(tiles, 65535))), dim3(kThreads), 0, call.stream,
         operand<T>(call, 0), operand<const T>(call, 1), int(N), int(rows), int(cols));
}

// [N, H W, C] to [N, C, H W]
template <class T>
void flatten_fwd(const Call& call) {
  const Flatten& s = call.shape<Flatten>();
  run_transpose<T>(call, s.H * s.W, s.C);
}

template <class T>
void flatten_bwd(const Call& call) {
  const Flatten& s = call.shape<Flatten>();
  run_transpose<T>(call, s.C, s.H * s.W);
}

}  // namespace

template <class T>
void add_vector_ops(OpTable& table) {
  set_map<T, Op::fill_zero>(table);
  set_map<T, Op::copy>(table);
  set_map<T, Op::add>(table);
  set_op(table, Op::flatten_fwd, flatten_fwd<T>);
  set_op(table, Op::flatten_bwd, flatten_bwd<T>);
}
template void add_vector_ops<float>(OpTable&);
template void add_vector_ops<double>(OpTable&);

}  // namespace fastmaml::FASTMAML_CUDA_NS
