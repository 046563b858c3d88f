// The eight ops of a layer y = x * w + b, shared by linear.cu and conv2d.cu.
// A Family gives precision, sizes, and Forms of the tile engine (kernels/gemm_tile.cuh).
// The operands have the same roles in both families (program/op.h).
#pragma once

#include <algorithm>
#include <stdexcept>

#include "cuda/choose.h"
#include "cuda/launch.h"
#include "cuda/operands.h"

namespace fastmaml::FASTMAML_CUDA_NS {

template <class Work>
void launch_product(const typename Work::Form& form, const Product<typename Work::T>& p, int64_t cols, int64_t tasks, uintptr_t stream) {
  using Tile = typename Work::Tile;
  const int row_tiles = form.row_tiles(Tile::kRows), col_tiles = int((cols + Tile::kCols - 1) / Tile::kCols);
  const int64_t blocks = tasks * p.parts * row_tiles * col_tiles;
  if (blocks > INT32_MAX) throw std::invalid_argument("a product needs more than 2^31 blocks: use fewer tasks at once");
  launch(product<Work>, dim3(unsigned(blocks)), dim3(Tile::kThreads), Work::kSharedBytes, stream, form, p, row_tiles, col_tiles);
}

template <class Family, bool dual, bool weight, class T, class Form>
void launch_product(TileSize tile, const Form& form, const Product<T>& p, int64_t cols, int64_t tasks, uintptr_t stream) {
  using Choice = Tiles<T, dual, weight>;
  if constexpr (Family::kPrecision != Precision::float32) {
    using Tensor = typename TensorTiles<dual, weight>::Any;
    constexpr Numbers numbers = Family::kPrecision == Precision::tf32     ? Numbers::tf32
                                : Family::kPrecision == Precision::tf32x3 ? Numbers::tf32x3
                                                                          : Numbers::bf16x3;
    if (tile == TileSize::large || tile == TileSize::medium)
      return launch_product<TensorProduct<Tensor, Form, dual, numbers>>(form, p, cols, tasks, stream);
  }
  switch (tile) {
    case TileSize::large:
      return launch_product<TileProduct<T, typename Choice::Large, Form, dual>>(form, p, cols, tasks, stream);
    case TileSize::medium:
      return launch_product<TileProduct<T, typename Choice::Medium, Form, dual>>(form, p, cols, tasks, stream);
    case TileSize::half:
      return launch_product<TileProduct<T, typename Choice::Half, Form, dual>>(form, p, cols, tasks, stream);
    case TileSize::flat:
      return launch_product<TileProduct<T, typename Choice::Flat, Form, dual>>(form, p, cols, tasks, stream);
    case TileSize::small:
      return launch_product<TileProduct<T, typename Choice::Small, Form, dual>>(form, p, cols, tasks, stream);
  }
}

// Sets up the rectifier of a layer's products: by `mask`, or by the product itself.
template <class T>
void rectify(Product<T>& p, const Rectified& how, PerTask<const T> mask = {}) {
  p.rectified = true;
  p.act = {T(how.slope)};
  p.mask = mask;
}

// y = x w + b
template <class T, class Family, bool dual>
void forward(const Call& call, Product<T> p) {
  const Family layer(call);
  p.wide_a = wide(p.a[0], layer.in) && wide(p.a[1], layer.in);
  p.wide_b = wide(p.b[0], layer.out) && wide(p.b[1], layer.out);
  p.wide_out = wide(p.out[0], layer.out) && wide(p.out[1], layer.out) && wide(p.mask, layer.out);
  const ProductSize size = layer.forward_size();
  launch_product<Family, dual, false>(choose_tile(size), layer.forward(), p, size.cols, call.tasks, call.stream);
}

template <class T, class Family>
void fwd(const Call& call) {
  Product<T> p;
  p.out[0] = operand<T>(call, 0);
  p.a[0] = operand<const T>(call, 1);
  p.b[0] = operand<const T>(call, 2);
  p.bias[0] = operand<const T>(call, 3);
  if (const Rectified y = rectified_output(call.layer); y.on) rectify(p, y);
  forward<T, Family, false>(call, p);
}

template <class T, class Family>
void fwd_jvp(const Call& call) {
  Product<T> p;
  p.out[0] = operand<T>(call, 0);
  p.a[0] = operand<const T>(call, 1);
  p.b[0] = operand<const T>(call, 4);
  p.bias[0] = operand<const T>(call, 5);
  if (call[2]) {
    p.terms = 2;
    p.a[1] = operand<const T>(call, 2);
    p.b[1] = operand<const T>(call, 3);
  }
  if (call[6]) rectify(p, rectified_output(call.layer), operand<const T>(call, 6));
  forward<T, Family, false>(call, p);
}

template <class T, class Family>
void fwd_dual(const Call& call) {
  const Rectified y = rectified_output(call.layer);
  if (!call[3]) {  // the first layer: two products with the same x
    const View primal[] = {call[0], call[2], call[4], call[6]};
    const View tangent[] = {call[1], call[2], {}, call[4], call[5], call[7], y.on ? call[0] : View{}};
    fwd<T, Family>({call.step, call.layer, primal, call.tasks, call.scratch, call.stream});
    fwd_jvp<T, Family>({call.step, call.layer, tangent, call.tasks, call.scratch, call.stream});
    return;
  }
  Product<T> p;
  for (int i = 0; i < 2; ++i) {
    p.out[i] = operand<T>(call, i);
    p.a[i] = operand<const T>(call, 2 + i);
    p.b[i] = operand<const T>(call, 4 + i);
    p.bias[i] = operand<const T>(call, 6 + i);
  }
  if (y.on) rectify(p, y);
  forward<T, Family, true>(call, p);
}

// dx = dy w^T, masked by the rectifier that made x, if there is one; `x` is then that operand's number.
template <class T, class Family, bool dual>
void backward_data(const Call& call, Product<T> p, int x) {
  const Family layer(call);
  if (call[x]) rectify(p, rectified_input(call.layer), operand<const T>(call, x));
  p.wide_a = wide(p.a[0], layer.out) && wide(p.a[1], layer.out);
  p.wide_b = wide(p.b[0], layer.out) && wide(p.b[1], layer.out);
  p.wide_out = wide(p.out[0], layer.in) && wide(p.out[1], layer.in) && wide(p.mask, layer.in);
  const ProductSize size = layer.backward_data_size();
  launch_product<Family, dual, false>(choose_tile(size), layer.backward_data(), p, size.cols, call.tasks, call.stream);
}

template <class T, class Family>
void bwd_data(const Call& call) {
  Product<T> p;
  p.out[0] = operand<T>(call, 0);
  p.a[0] = operand<const T>(call, 1);
  p.b[0] = operand<const T>(call, 2);
  backward_data<T, Family, false>(call, p, 3);
}

template <class T, class Family>
void bwd_data_jvp(const Call& call) {
  Product<T> p;
  p.out[0] = operand<T>(call, 0);
  p.terms = 2;
  p.a[0] = operand<const T>(call, 1);
  p.b[0] = operand<const T>(call, 4);
  p.a[1] = operand<const T>(call, 2);
  p.b[1] = operand<const T>(call, 3);
  backward_data<T, Family, false>(call, p, 5);
}

template <class T, class Family>
void bwd_data_dual(const Call& call) {
  Product<T> p;
  for (int i = 0; i < 2; ++i) {
    p.out[i] = operand<T>(call, i);
    p.a[i] = operand<const T>(call, 2 + i);
    p.b[i] = operand<const T>(call, 4 + i);
  }
  backward_data<T, Family, true>(call, p, 6);
}

// How the sum dw = x^T dy is cut, and the scratch that this needs.
template <class T>
struct WeightParts {
  Parts parts;
  int64_t stride;  // numbers of one part: dw, then db
  int64_t tasks;   // at once

  explicit WeightParts(ProductSize size)
      : parts(choose_parts(size.depth)), stride((size.rows * size.cols + size.cols + kChunk<T> - 1) / kChunk<T> * kChunk<T>) {
    constexpr int64_t kTile = 64;
    tasks = choose_tasks_at_once(parts.count * ((size.rows + kTile - 1) / kTile) * ((size.cols + kTile - 1) / kTile));
  }
  size_t bytes() const { return parts.count > 1 ? size_t(tasks * parts.count * stride) * sizeof(T) : 0; }
};

template <class T, class Family>
size_t weight_scratch_bytes(const Step& step, const Layer& layer) {
  return WeightParts<T>(Family(step, layer).backward_weight_size()).bytes();
}

// dw = x^T dy, db = the sum of dy's rows
template <class T, class Family>
void backward_weight(const Call& call, Product<T> p) {
  const Family layer(call);
  p.wide_a = wide(p.a[0], layer.in) && wide(p.a[1], layer.in);
  p.wide_b = wide(p.b[0], layer.out) && wide(p.b[1], layer.out);
  const ProductSize size = layer.backward_weight_size();
  const WeightParts<T> cut(size);
  const auto run = [&](int64_t tasks) {
    p.wide_out = wide(p.out[0], layer.out) && p.part_stride % kChunk<T> == 0;
    launch_product<Family, false, true>(choose_weight_tile(size), layer.backward_weight(), p, size.cols, tasks, call.stream);
  };
  if (cut.parts.count == 1) return run(call.tasks);

  const PerTask<T> dw = p.out[0], db = p.sums;
  const int64_t stride = cut.parts.count * cut.stride;
  T* const scratch = static_cast<T*>(call.scratch);
  p.out[0] = {scratch, stride};
  if (db.data) p.sums = {scratch + size.rows * size.cols, stride};
  p.parts = cut.parts.count;
  p.part_depth = cut.parts.depth;
  p.part_stride = cut.stride;
  const int64_t rounds = (call.tasks + cut.tasks - 1) / cut.tasks,
                at_once = (call.tasks + rounds - 1) / rounds;  // rounds of equal size, so that none is nearly empty
  for (int64_t first = 0; first < call.tasks; first += at_once) {
    const int64_t tasks = std::min(at_once, call.tasks - first);
    run(tasks);
    constexpr int kThreads = 128;
    const int numbers = int(size.rows * size.cols), sums = db.data ? int(size.cols) : 0;
    const PerTask<T> dw_here{dw.data + first * dw.task_stride, dw.task_stride};
    const PerTask<T> db_here{sums ? db.data + first * db.task_stride : nullptr, db.task_stride};
    launch(sum_parts<T, kThreads>, dim3((numbers + sums + kThreads - 1) / kThreads, unsigned(tasks)), dim3(kThreads), 0, call.stream,
           dw_here, db_here, PerTask<const T>{scratch, stride}, p.parts, p.part_stride, numbers, sums);
    for (int i = 0; i < 2; ++i) {
      p.a[i].data += at_once * p.a[i].task_stride;
      p.b[i].data += at_once * p.b[i].task_stride;
    }
  }
}

template <class T, class Family>
void bwd_weight(const Call& call) {
  Product<T> p;
  p.out[0] = operand<T>(call, 0);
  p.sums = operand<T>(call, 1);
  p.a[0] = operand<const T>(call, 2);
  p.b[0] = operand<const T>(call, 3);
  backward_weight<T, Family>(call, p);
}

template <class T, class Family>
void bwd_weight_jvp(const Call& call) {
  Product<T> p;
  p.out[0] = operand<T>(call, 0);
  p.sums = operand<T>(call, 1);  // the sum of dy_dot
  p.a[0] = operand<const T>(call, 2);
  p.b[0] = operand<const T>(call, 5);
  if (call[3]) {
    p.terms = 2;
    p.a[1] = operand<const T>(call, 3);
    p.b[1] = operand<const T>(call, 4);
  }
  backward_weight<T, Family>(call, p);
}

// In the order of program/op.h.
inline constexpr int kProductOps = 8;
template <class T, class Family>
inline constexpr OpFn product_ops[kProductOps] = {fwd<T, Family>,        fwd_jvp<T, Family>,       fwd_dual<T, Family>,
                                                  bwd_data<T, Family>,   bwd_data_jvp<T, Family>,  bwd_data_dual<T, Family>,
                                                  bwd_weight<T, Family>, bwd_weight_jvp<T, Family>};

template <class T, class Family>
void add_product_ops(OpTable& table, Op first, const OpFn (&ops)[kProductOps]) {
  for (int i = 0; i < kProductOps; ++i)
    set_op(table, Op(static_cast<int>(first) + i), ops[i], i < kProductOps - 2 ? nullptr : weight_scratch_bytes<T, Family>);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
