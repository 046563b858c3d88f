// Chooses the tile of each product, and the number of parts of a long sum.
// Sizes of the layer and N decide, never the number of tasks, so a task's bits do not depend on its batch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/columns.cuh"
#include "cuda/kernels/gemm_tensor.cuh"
#include "cuda/kernels/resident_step.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

struct ProductSize {
  int64_t rows, cols, depth;
};

// From 1024 rows on, even large tiles are enough to fill a GPU with a few tasks.
inline constexpr int64_t kManyRows = 1024, kSomeRows = 256;

// half, flat and small are for few rows.
enum class TileSize { large, medium, half, flat, small };

inline TileSize choose_tile(ProductSize size) {
  if (size.rows >= kManyRows) return size.cols > 32 ? TileSize::large : TileSize::medium;
  if (size.cols <= 32) return TileSize::small;
  return size.rows >= kSomeRows ? TileSize::half : TileSize::flat;
}

// Weight gradients are small matrices of long sums. Cutting the sums into parts gives more tiles.
inline TileSize choose_weight_tile(ProductSize size) {
  if (size.rows <= 32) return TileSize::small;
  if (size.depth < kManyRows) return size.cols > 32 ? TileSize::flat : TileSize::small;
  return size.cols > 32 ? TileSize::large : TileSize::medium;
}

// 8 x 8 numbers for each thread if registers allow: 16 fma for one 16-byte read of shared memory.
// With few rows, a multiprocessor has few blocks. Three stages then keep twice as many bytes in flight.
template <class T, bool dual, bool weight>
struct Tiles {
  using Large = Tile<128, 64, 8, 8, 2>;
  using Medium = Tile<128, 32, 8, 8, 2>;
  using Half = Tile<64, 64, 8, 4, 3>;
  using Flat = Tile<32, 64, 4, 8, 3>;
  using Small = Tile<32, 32, 4, 4, 3>;
};
template <>
struct Tiles<float, true, false> {  // two sums for each thread
  using Large = Tile<64, 64, 8, 4, 2>;
  using Medium = Tile<64, 32, 8, 4, 2>;
  using Half = Large;
  using Flat = Tile<32, 64, 8, 4, 2>;
  using Small = Tile<32, 32, 4, 4, 3>;
};
template <>
struct Tiles<float, false, true> {
  using Large = Tile<64, 64, 8, 8, 2>;
  using Medium = Tile<64, 32, 8, 4, 2>;
  using Half = Large;
  using Flat = Tile<32, 64, 4, 8, 3>;
  using Small = Tile<32, 32, 4, 4, 3>;
};
template <bool dual, bool weight>
struct Tiles<double, dual, weight> {  // float64 is for gradient checks: one size
  using Large = Tile<32, 32, 4, 4, 2>;
  using Medium = Large;
  using Half = Large;
  using Flat = Large;
  using Small = Large;
};

// Tensor cores compute the products of large and medium tiles.
template <bool dual, bool weight>
struct TensorTiles {
  using Any = TensorTile<64, 64, 32, 32>;
};
template <>
struct TensorTiles<false, false> {
  using Any = TensorTile<128, 64, 32, 64>;
};

struct Parts {
  int count, depth;  // k's of each part, a multiple of kDepth
};

// Sums over up to 1024 rows stay whole. Longer ones are cut into parts of 512 or more, which gives enough blocks for a GPU.
// The parts are added in double, so the error does not grow with the length.
inline Parts choose_parts(int64_t depth) {
  constexpr int64_t kWhole = 1024, kPart = 512, kMost = 256;
  const int64_t parts = depth <= kWhole ? 1 : std::min((depth + kPart - 1) / kPart, kMost);
  const int64_t part_depth = ((depth + parts - 1) / parts + kDepth - 1) / kDepth * kDepth;
  return {int((depth + part_depth - 1) / part_depth), int(part_depth)};
}

// Blocks that fill the largest GPU about four times. So many tasks share the scratch of a cut sum; further tasks need another launch.
inline constexpr int64_t kBlocksAtOnce = 2048;
inline int64_t choose_tasks_at_once(int64_t blocks_per_task) {
#ifdef FASTMAML_EMULATED
  const int64_t blocks = emu::blocks_at_once;
#else
  constexpr int64_t blocks = kBlocksAtOnce;
#endif
  return std::max<int64_t>(blocks / blocks_per_task, 1);
}

// ---------------------------------------------------------------- [rows, C] with numbers for every column (kernels/columns.cuh)

// `lanes` threads side by side, at most `widest`. Below them as many as a block holds, with at least four rows each.
inline Columns choose_columns(int64_t rows, int64_t C, int chunk, int64_t widest, int64_t threads = kColumnThreads) {
  const int64_t chunks = (C + chunk - 1) / chunk, groups = (chunks + widest - 1) / widest, lanes = (chunks + groups - 1) / groups;
  int row_lanes = 1;
  while (2 * row_lanes * lanes <= threads && 4 * row_lanes < rows) row_lanes *= 2;
  return {int(rows), int(C), int(lanes), row_lanes, int(rows)};
}

// Lines of 128 bytes, so that few tasks already give many blocks. Long sums are cut.
inline Columns choose_column_sum(int64_t rows, int64_t C, int chunk) {
  constexpr int64_t kWhole = 4096, kPart = 2048;
  Columns s = choose_columns(rows, C, chunk, 8);
  const int64_t parts = rows <= kWhole ? 1 : (rows + kPart - 1) / kPart;
  s.part_rows = int((rows + parts - 1) / parts);
  return s;
}

// A thread loads its channels' numbers once for 4 or 16 rows.
inline Columns choose_column_map(int64_t rows, int64_t C, int chunk) {
  Columns s = choose_columns(rows, C, chunk, 32);
  int64_t part_rows = s.row_lanes * (rows <= 4096 ? 4 : 16);
  while ((rows + part_rows - 1) / part_rows > 65535) part_rows *= 2;
  s.part_rows = int(part_rows);
  return s;
}

// About two classes for each thread.
inline int choose_loss_lanes(int64_t classes) {
  int lanes = 1;
  while (2 * lanes < classes && lanes < 32) lanes *= 2;
  return lanes;
}

// ---------------------------------------------------------------- one block for a task (resident.cu)

// In the layered walk a Step costs at least a launch of 4 us; in this time one block computes about half a million products.
// A task with twice as many products for each Step, on average, runs better spread over the whole GPU.
inline constexpr int64_t kMostResidentProducts = int64_t(1) << 20;

// The share of operands that must lie in shared memory. With less, the block mostly waits for the L2 cache.
inline constexpr double kLeastInShared = 0.5;

// As many threads as the Schedule's widest Step can use: one for each chunk of a row of the output.
inline unsigned choose_resident_threads(int64_t chunks) {
  unsigned threads = 32;
  while (threads < kResidentThreads && threads < chunks) threads *= 2;
  return threads;
}

// A tall tile reads least from shared memory, but at least two warps should have one. Otherwise each thread takes one row.
// Up to 32 idle threads can share a tile's sum, if each gets at least two chunks.
template <class T>
ResidentTiles choose_resident_tiles(ProductSize size, bool dual, unsigned threads) {
  constexpr int64_t kTwoWarps = 64, chunk = kChunk<T>;
  const int64_t tall_rows = dual ? kTallRows<T, true> : kTallRows<T, false>;
  const int64_t across = (size.cols + chunk - 1) / chunk, high = (size.rows + tall_rows - 1) / tall_rows;
  const bool tall = tall_rows > 1 && across * high >= kTwoWarps;
  const int64_t tiles = across * (tall ? high : size.rows);
  int split = 1;
  while (2 * split * tiles <= threads && 4 * split * chunk <= size.depth && split < 32) split *= 2;
  return {int(size.rows), int(size.cols), int(size.depth), tall, split};
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
