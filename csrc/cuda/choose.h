// Which tile serves which product, and into how many parts a long sum is cut. Sizes of the layer and N decide, never the number of
// tasks: so a task's bits do not depend on its batch.
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

// From 1024 rows on there are tiles enough to fill a GPU with a few tasks, even if they are large.
inline constexpr int64_t kManyRows = 1024, kSomeRows = 256;

// Half, flat and small ones are for few rows.
enum class TileSize { large, medium, half, flat, small };

inline TileSize choose_tile(ProductSize size) {
  if (size.rows >= kManyRows) return size.cols > 32 ? TileSize::large : TileSize::medium;
  if (size.cols <= 32) return TileSize::small;
  return size.rows >= kSomeRows ? TileSize::half : TileSize::flat;
}

// Weight gradients are small matrices of long sums: their parts make the tiles many.
inline TileSize choose_weight_tile(ProductSize size) {
  if (size.rows <= 32) return TileSize::small;
  if (size.depth < kManyRows) return size.cols > 32 ? TileSize::flat : TileSize::small;
  return size.cols > 32 ? TileSize::large : TileSize::medium;
}

// 8 x 8 numbers a thread where registers allow: 16 fma to one 16-byte read of shared memory. Where there are few rows the blocks of a
// multiprocessor are few, too: then three stages keep twice as many bytes under way.
template <class T, bool dual, bool weight>
struct Tiles {
  using Large = Tile<128, 64, 8, 8, 2>;
  using Medium = Tile<128, 32, 8, 8, 2>;
  using Half = Tile<64, 64, 8, 4, 3>;
  using Flat = Tile<32, 64, 4, 8, 3>;
  using Small = Tile<32, 32, 4, 4, 3>;
};
template <>
struct Tiles<float, true, false> {  // two sums a thread
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
struct Tiles<double, dual, weight> {  // for gradient checks: one size
  using Large = Tile<32, 32, 4, 4, 2>;
  using Medium = Large;
  using Half = Large;
  using Flat = Large;
  using Small = Large;
};

// Tensor cores take the products of large and medium tiles.
template <bool dual, bool weight>
struct TensorTiles {
  using Any = TensorTile<64, 64, 32, 32>;
};
template <>
struct TensorTiles<false, false> {
  using Any = TensorTile<128, 64, 32, 64>;
};

struct Parts {
  int count, depth;  // `depth` k's a part, a multiple of kDepth
};

// Sums over up to 1024 rows stay whole, longer ones are cut into parts of 512 or more: enough blocks for a GPU, and an error that does not
// grow with the length (the parts are added in double).
inline Parts choose_parts(int64_t depth) {
  constexpr int64_t kWhole = 1024, kPart = 512, kMost = 256;
  const int64_t parts = depth <= kWhole ? 1 : std::min((depth + kPart - 1) / kPart, kMost);
  const int64_t part_depth = ((depth + parts - 1) / parts + kDepth - 1) / kDepth * kDepth;
  return {int((depth + part_depth - 1) / part_depth), int(part_depth)};
}

// As many tasks share the scratch of a cut sum, one launch after the other, as fill the largest GPU about four times.
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

// `lanes` threads side by side, at most `widest`, and as many below as make a block, but no more than have four rows each.
inline Columns choose_columns(int64_t rows, int64_t C, int chunk, int64_t widest, int64_t threads = kColumnThreads) {
  const int64_t chunks = (C + chunk - 1) / chunk, groups = (chunks + widest - 1) / widest, lanes = (chunks + groups - 1) / groups;
  int row_lanes = 1;
  while (2 * row_lanes * lanes <= threads && 4 * row_lanes < rows) row_lanes *= 2;
  return {int(rows), int(C), int(lanes), row_lanes, int(rows)};
}

// Lines of 128 bytes, so that few tasks already make many blocks; long sums are cut.
inline Columns choose_column_sum(int64_t rows, int64_t C, int chunk) {
  constexpr int64_t kWhole = 4096, kPart = 2048;
  Columns s = choose_columns(rows, C, chunk, 8);
  const int64_t parts = rows <= kWhole ? 1 : (rows + kPart - 1) / kPart;
  s.part_rows = int((rows + parts - 1) / parts);
  return s;
}

// A thread loads what belongs to its channels once for 4 or 16 rows.
inline Columns choose_column_map(int64_t rows, int64_t C, int chunk) {
  Columns s = choose_columns(rows, C, chunk, 32);
  int64_t part_rows = s.row_lanes * (rows <= 4096 ? 4 : 16);
  while ((rows + part_rows - 1) / part_rows > 65535) part_rows *= 2;
  s.part_rows = int(part_rows);
  return s;
}

// About two classes a thread.
inline int choose_loss_lanes(int64_t classes) {
  int lanes = 1;
  while (2 * lanes < classes && lanes < 32) lanes *= 2;
  return lanes;
}

// ---------------------------------------------------------------- one block for a task (resident.cu)

// Walked layer by layer, a Step costs at least the 4 us of its launch, in which one block does about half a million products; a task
// whose Steps take twice as many on average is better spread over the whole GPU.
inline constexpr int64_t kMostResidentProducts = int64_t(1) << 20;

// The share of the Steps' operands that must lie in shared memory; with less of it the block waits for the L2 cache most of its time.
inline constexpr double kLeastInShared = 0.5;

// As many threads as the Schedule's widest Step has use for: chunks of the output, of one row each.
inline unsigned choose_resident_threads(int64_t chunks) {
  unsigned threads = 32;
  while (threads < kResidentThreads && threads < chunks) threads *= 2;
  return threads;
}

// A tall tile reads least from shared memory, but two warps of threads should have one; short of that a row each. Where
// threads are left over, up to 32 share a tile's sum, each at least two chunks of it.
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
