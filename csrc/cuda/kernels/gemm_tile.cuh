// The engine of all products, matrices and convolutions:  out [rows, cols] = sum over k of a [rows, k] b [k, cols], for each task.
// A block makes one tile of `out`. Operands come through shared memory, 16 k's at a time, in several stages.
// A Form (gemm.cuh, conv2d.cuh) knows where the numbers lie in global memory.
// Here the columns of `b` are also called rows, so both operands are [rows, k].
#pragma once

#include "cuda/kernels/operands.cuh"
#include "cuda/kernels/rectifier.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

inline constexpr int kDepth = 16;  // k's of one stage

// A block's tile of `out`, each thread's share, and the stages of the operands in shared memory. All stages but one are in flight.
template <int rows, int cols, int thread_rows, int thread_cols, int stages>
struct Tile {
  static constexpr int kStages = stages;
  static constexpr int kRows = rows, kCols = cols, kThreadRows = thread_rows, kThreadCols = thread_cols;
  static constexpr int kThreads = (rows / thread_rows) * (cols / thread_cols);
};

// out = a[0] b[0] (+ a[1] b[1]) + bias[0].     Dual: out[0] = a[0] b[0] + bias[0],  out[1] = a[0] b[1] + a[1] b[0] + bias[1]
template <class T>
struct Product {
  PerTask<const T> a[2], b[2], bias[2];
  PerTask<T> out[2];
  PerTask<T> sums;  // [cols], the sum of b[0] over k; absent in most products
  // rectified: every out is multiplied by act'(mask), mask [rows, cols]. Without a mask, by act'(out[0]), which makes out[0] act(out[0]).
  bool rectified = false;
  Rectifier<T> act = {T(0)};
  PerTask<const T> mask;
  int terms = 1;
  bool wide_a = false, wide_b = false, wide_out = false;  // can be read and written in chunks
  // k is cut into `parts` of part_depth (a multiple of kDepth); part p writes to out + p part_stride and sums + p part_stride.
  int parts = 1, part_depth = 0;
  int64_t part_stride = 0;
};

// Which numbers of the operand are neighbours in memory, its k's or its rows? Shared memory has the same order.
enum class Order { along_k, along_rows };

// One operand: copies `rows` x kDepth of its numbers to shared memory, and reads them there.
// A Source finds the numbers. row(r) and at_k(k) are cursors, which step(cursor, n) moves.
// find(row, k, from) says whether there is a number, and where. wide_tensor: gemm_tensor.cuh reads pairs and chunks.
template <class T, class Source, int rows, int per_thread, int threads, bool wide_tensor = false>
class Operand {
 public:
  static constexpr bool kAlongK = Source::kOrder == Order::along_k;
  // The padding avoids bank conflicts: threads that are served together touch all 32 banks.
  // along_k: chunks of 8 neighbours, and for tensor cores 8 rows of 4 k's.
  // wide_tensor: pairs of 4 lines along_k, and along_rows chunks of 2 x 4 that are two lines apart.
  static constexpr int kStride = kAlongK ? kDepth + (wide_tensor ? 8 : kChunk<T>) : rows + (wide_tensor ? 4 : 8);
  static constexpr int kSize = (kAlongK ? rows : kDepth) * kStride;

  __device__ Operand(const Source& source, bool wide) : source_(source), wide_(wide), first_(source.row(kAlongK ? 0 : across())) {}

  __device__ void start_at(int k) { k_ = source_.at_k(k + (kAlongK ? across() : line())); }

  // Starts the copies of the next kDepth k's, of one operand or of two with the same layout.
  template <int sets>
  __device__ void copy(T* tile, const T* const (&from)[sets]) {
    if (wide_)
      copy_by<kChunk<T>>(tile, from);
    else
      copy_by<1>(tile, from);
  }

  // The row in register i of the thread at `place`, out of kAcross threads side by side.
  static __device__ int row(int place, int i) {
    return kAlongK ? i * kAcross + place : (i / kChunk<T> * kAcross + place) * kChunk<T> + i % kChunk<T>;
  }

  static __device__ T at(const T* tile, int row, int k) { return tile[kAlongK ? row * kStride + k : k * kStride + row]; }

  // values[s][i] = the element of row(place, i) at k + s
  static __device__ void read(T (&values)[kChunk<T>][per_thread], const T* tile, int place, int k) {
    if constexpr (kAlongK) {
#pragma unroll
      for (int i = 0; i < per_thread; ++i) {
        const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(tile + row(place, i) * kStride + k);
#pragma unroll
        for (int s = 0; s < kChunk<T>; ++s) values[s][i] = chunk.at[s];
      }
    } else {
#pragma unroll
      for (int s = 0; s < kChunk<T>; ++s)
#pragma unroll
        for (int i = 0; i < per_thread; i += kChunk<T>) {
          const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(tile + (k + s) * kStride + row(place, i));
#pragma unroll
          for (int e = 0; e < kChunk<T>; ++e) values[s][i + e] = chunk.at[e];
        }
    }
  }

 private:
  static constexpr int kAcross = rows / per_thread;
  static constexpr int kChunksInLine = (kAlongK ? kDepth : rows) / kChunk<T>, kLines = kAlongK ? rows : kDepth;
  static constexpr int kLinesAtOnce = threads / kChunksInLine, kPasses = kLines / kLinesAtOnce;
  static_assert(kLinesAtOnce * kChunksInLine == threads && kPasses * kLinesAtOnce == kLines,
                "every thread copies the same number of chunks");

  const Source source_;
  const bool wide_;
  const typename Source::Row first_;
  typename Source::K k_;

  static __device__ int line() { return threadIdx.x / kChunksInLine; }
  static __device__ int across() { return threadIdx.x % kChunksInLine * kChunk<T>; }

  template <int elements, int sets>
  __device__ void copy_by(T* tile, const T* const (&from)[sets]) {
    if constexpr (kAlongK) {
      auto k = k_;
#pragma unroll 1  // only copies by chunks need to be fast
      for (int e = 0; e < kChunk<T>; e += elements) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          const int row = line() + pass * kLinesAtOnce;
          put<elements>(tile + row * kStride + across() + e, from, source_.row(row), k);
        }
        source_.step(k, 1);
      }
      source_.step(k_, kDepth);
    } else {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        auto row = first_;
#pragma unroll 1
        for (int e = 0; e < kChunk<T>; e += elements) {
          put<elements>(tile + (line() + pass * kLinesAtOnce) * kStride + across() + e, from, row, k_);
          source_.step(row, 1);
        }
        source_.step(k_, kLinesAtOnce);
      }
    }
  }

  template <int elements, int sets>
  __device__ void put(T* to, const T* const (&from)[sets], const typename Source::Row& row, const typename Source::K& k) const {
    int offset;
    const bool valid = source_.find(row, k, offset);
#pragma unroll
    for (int s = 0; s < sets; ++s) async_copy<elements* int(sizeof(T))>(to + s * kSize, from[s] + offset, valid);
  }
};

// sum[i][j] += sum over s of a[s][i] b[s][j]
template <class T, int depth, int rows, int cols>
__device__ __forceinline__ void add_outer_products(T (&sum)[rows][cols], const T (&a)[depth][rows], const T (&b)[depth][cols]) {
#pragma unroll
  for (int s = 0; s < depth; ++s)
#pragma unroll
    for (int i = 0; i < rows; ++i)
#pragma unroll
      for (int j = 0; j < cols; ++j) sum[i][j] = fma(a[s][i], b[s][j], sum[i][j]);
}

// The work of one block. A Form makes it from the block's place in the grid.
//   Form::Block<Tile> has a source of each operand (a, b), `depth`, cols, first_col, and out_row(r), which is negative outside of `out`.
//   It may use Form::kTable numbers of 16 bytes for each row to remember where rows lie.
template <class T_, class Tile_, class Form_, bool dual>
struct TileProduct {
  using T = T_;
  using Tile = Tile_;
  using Form = Form_;
  using Block = typename Form::template Block<Tile>;
  using A = Operand<T, typename Block::A, Tile::kRows, Tile::kThreadRows, Tile::kThreads>;
  using B = Operand<T, typename Block::B, Tile::kCols, Tile::kThreadCols, Tile::kThreads>;
  static constexpr int kBlocks = 0;  // least number of blocks that a multiprocessor should hold; 0: the compiler decides
  static constexpr int kSets = dual ? 2 : 1, kV = kChunk<T>, kAcross = Tile::kCols / Tile::kThreadCols;
  static constexpr int kStage = kSets * (A::kSize + B::kSize);
  static constexpr size_t kTableBytes = Form::kTable * Tile::kRows * 16, kSharedBytes = kTableBytes + Tile::kStages * kStage * sizeof(T);

  using Sum = T[Tile::kThreadRows][Tile::kThreadCols];

  static __device__ void add_tile(Sum (&sum)[kSets], const T* tile) {
    const int a_place = threadIdx.x / kAcross, b_place = threadIdx.x % kAcross;
    const T* b_tile = tile + kSets * A::kSize;
#pragma unroll
    for (int k = 0; k < kDepth; k += kV) {
      T a[kV][Tile::kThreadRows], b[kV][Tile::kThreadCols];
      A::read(a, tile, a_place, k);
      B::read(b, b_tile, b_place, k);
      add_outer_products(sum[0], a, b);
      if constexpr (dual) {
        T other_a[kV][Tile::kThreadRows], other_b[kV][Tile::kThreadCols];
        B::read(other_b, b_tile + B::kSize, b_place, k);
        add_outer_products(sum[1], a, other_b);
        A::read(other_a, tile + A::kSize, a_place, k);
        add_outer_products(sum[1], other_a, b);
      }
    }
  }

  // The thread's share of `out`: kLines rows, and in each row kSpans runs of kSide neighbouring columns.
  static constexpr int kLines = Tile::kThreadRows, kSide = B::kAlongK ? 1 : kV, kSpans = Tile::kThreadCols / kSide;
  static __device__ int line(int i) { return A::row(threadIdx.x / kAcross, i); }
  static __device__ int span(int j) { return B::row(threadIdx.x % kAcross, j * kSide); }
  static __device__ T at(const Sum& sum, int i, int j, int e) { return sum[i][j * kSide + e]; }
};

// Writes a block's sums to out, with bias and rectifier.
template <class Work, bool rectified, class T>
__device__ __forceinline__ void write(const typename Work::Block& block, const typename Work::Sum (&sum)[Work::kSets], const Product<T>& p,
                                      int64_t task, int64_t part_offset) {
  constexpr int kSets = Work::kSets, kSide = Work::kSide;
  T* out[kSets];
  const T* bias[kSets];
#pragma unroll
  for (int s = 0; s < kSets; ++s) {
    out[s] = p.out[s].of(task) + part_offset;
    bias[s] = p.bias[s].of(task);
  }
  const T* const mask = rectified ? p.mask.of(task) : nullptr;
  int lines[Work::kLines];
#pragma unroll
  for (int i = 0; i < Work::kLines; ++i) lines[i] = block.out_row(Work::line(i)) * block.cols;  // negative: outside of out
#pragma unroll
  for (int j = 0; j < Work::kSpans; ++j) {
    const int col = block.first_col + Work::span(j), count = min(block.cols - col, kSide);
    if (count <= 0) continue;
    Chunk<T, kSide> biases[kSets] = {};
#pragma unroll
    for (int s = 0; s < kSets; ++s)
      if (bias[s]) biases[s] = load<false, kSide>(bias[s] + col, count);
#pragma unroll
    for (int i = 0; i < Work::kLines; ++i) {
      if (lines[i] < 0) continue;
      const int place = lines[i] + col;
      Chunk<T, kSide> chunk[kSets];
#pragma unroll
      for (int s = 0; s < kSets; ++s)
#pragma unroll
        for (int e = 0; e < kSide; ++e) chunk[s].at[e] = Work::at(sum[s], i, j, e) + biases[s].at[e];
      if constexpr (rectified) {
        Chunk<T, kSide> sign = chunk[0];
        if (mask) sign = p.wide_out ? load<true, kSide>(mask + place, count) : load<false, kSide>(mask + place, count);
#pragma unroll
        for (int s = 0; s < kSets; ++s)
#pragma unroll
          for (int e = 0; e < kSide; ++e) chunk[s].at[e] = p.act.times_first(sign.at[e], chunk[s].at[e]);
      }
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        if (p.wide_out)
          store<true>(out[s] + place, chunk[s], count);
        else
          store<false>(out[s] + place, chunk[s], count);
      }
    }
  }
}

// The block's place is blockIdx.x = ((task * parts + part) * row_tiles + row_tile) * col_tiles + col_tile.
// Work: TileProduct, or TensorProduct of gemm_tensor.cuh.
template <class Work>
__global__ void __launch_bounds__(Work::Tile::kThreads, Work::kBlocks)
    product(const typename Work::Form form, const Product<typename Work::T> p, const int row_tiles, const int col_tiles) {
  using T = typename Work::T;
  using Tile = typename Work::Tile;
  using Form = typename Work::Form;
  using A = typename Work::A;
  using B = typename Work::B;
  FASTMAML_SHARED;
  T* const tiles = reinterpret_cast<T*>(shared_bytes + Work::kTableBytes);

  const unsigned tile = blockIdx.x / col_tiles, line = tile / row_tiles;
  const int row_tile = tile % row_tiles, col_tile = blockIdx.x % col_tiles, part = line % p.parts;
  const int64_t task = line / p.parts;

  const typename Work::Block block(form, row_tile, col_tile, shared_bytes);
  if (block.empty()) return;
  const T *const a[2] = {p.a[0].of(task), p.a[1].of(task)}, *const b[2] = {p.b[0].of(task), p.b[1].of(task)};
  const int first = part * p.part_depth, depth = p.parts > 1 ? min(p.part_depth, block.depth - first) : block.depth;
  const int per_term = (depth + kDepth - 1) / kDepth, steps = per_term * p.terms;
  A a_tile(block.a, p.wide_a);
  B b_tile(block.b, p.wide_b);

  constexpr int kStages = Tile::kStages;
  const auto copy = [&](int step, int stage) {
    if (step == 0 || step == per_term) {
      a_tile.start_at(first);
      b_tile.start_at(first);
    }
    T* const to = tiles + stage * Work::kStage;
    if constexpr (Work::kSets == 2) {
      a_tile.copy(to, a);
      b_tile.copy(to + 2 * A::kSize, b);
    } else {
      const T *const a_term[1] = {step < per_term ? a[0] : a[1]}, *const b_term[1] = {step < per_term ? b[0] : b[1]};
      a_tile.copy(to, a_term);
      b_tile.copy(to + A::kSize, b_term);
    }
  };

  typename Work::Sum sum[Work::kSets] = {};
  T* const sums = Form::kSums && row_tile == 0 && p.sums.data ? p.sums.of(task) + part * p.part_stride : nullptr;
  T column_sum = 0;  // the sum of column threadIdx.x
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step, step);
    async_commit();
  }
  for (int step = 0, stage = 0; step < steps; ++step, stage = stage + 1 == kStages ? 0 : stage + 1) {
    async_wait<kStages - 2>();
    __syncthreads();  // the tile is complete, and no thread still reads the previous one
    if (step + kStages - 1 < steps) copy(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    async_commit();
    const T* const here = tiles + stage * Work::kStage;
    Work::add_tile(sum, here);
    if constexpr (Form::kSums) {
      static_assert(Tile::kCols <= Tile::kThreads && !B::kAlongK);
      if (sums && step < per_term && threadIdx.x < Tile::kCols)
        for (int k = 0; k < kDepth; ++k) column_sum += here[A::kSize + k * B::kStride + threadIdx.x];
    }
  }

  const int64_t part_offset = part * p.part_stride;
  if (!Form::kSums && p.rectified)
    write<Work, !Form::kSums>(block, sum, p, task, part_offset);
  else
    write<Work, false>(block, sum, p, task, part_offset);
  if constexpr (Form::kSums) {
    const int col = block.first_col + threadIdx.x;
    if (sums && threadIdx.x < Tile::kCols && col < block.cols) sums[col] = column_sum;
  }
}

// out [size] and sums [cols] = the sum of `count` parts, each [size + cols], in order.  One thread for each number; blockIdx.y = task.
template <class T, int threads>
__global__ void __launch_bounds__(threads) sum_parts(const PerTask<T> out, const PerTask<T> sums, const PerTask<const T> parts,
                                                     const int count, const int64_t part_stride, const int size, const int cols) {
  const int64_t task = blockIdx.y;
  const int i = blockIdx.x * threads + threadIdx.x;
  if (i >= size + cols) return;
  const T* part = parts.of(task) + i;
  double sum = 0;
#pragma unroll 4
  for (int p = 0; p < count; ++p, part += part_stride) sum += *part;
  if (i < size)
    out.of(task)[i] = T(sum);
  else
    sums.of(task)[i - size] = T(sum);
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
