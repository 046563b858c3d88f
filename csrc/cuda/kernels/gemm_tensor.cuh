// The tile engine on tensor cores (sm_80 and later). TensorProduct replaces TileProduct in gemm_tile.cuh's kernel.
// float32 operands are converted as Numbers says; sums stay float32.
#pragma once

#include "cuda/kernels/gemm_tile.cuh"

namespace fastmaml::FASTMAML_CUDA_NS {

// How tensor cores see a float32 number:
//   tf32     rounded to 10 bits of mantissa
//   tf32x3   high + low, two numbers of TF32, which keep 21 bits. A product leaves out low x low.
//   bf16x3   high + low, two numbers of 7 bits, which keep 16. Needs half as many instructions as tf32x3.
enum class Numbers { tf32, tf32x3, bf16x3 };

// A block's tile of `out`, and the share of each of its warps.
template <int rows, int cols, int warp_rows, int warp_cols>
struct TensorTile {
  static constexpr int kStages = 2;
  static constexpr int kRows = rows, kCols = cols, kWarpRows = warp_rows, kWarpCols = warp_cols;
  static constexpr int kThreads = (rows / warp_rows) * (cols / warp_cols) * 32;
};

// One register of an mma's operand, and the remainder `low`. A register holds one TF32 number, or two BF16 numbers with neighbouring k.
template <Numbers numbers>
struct TensorWord {
  static constexpr bool kPairs = numbers == Numbers::bf16x3, kSplit = numbers != Numbers::tf32;
  static constexpr int kNumbers = kPairs ? 2 : 1;

  static __device__ uint32_t high(const float* x) {
    if constexpr (kPairs)
      return to_bf16x2(x[0], x[1]);
    else if constexpr (kSplit)
      return __float_as_uint(x[0]) & 0xffffe000u;  // truncated: low makes up for it, and rounding would take four instructions
    else
      return to_tf32(x[0]);
  }
  static __device__ uint32_t low(const float* x, uint32_t high) {
    if constexpr (kPairs)
      return to_bf16x2(x[0] - __uint_as_float(high << 16), x[1] - __uint_as_float(high & 0xffff0000u));
    else
      return __float_as_uint(x[0] - __uint_as_float(high)) + 0x1000u;  // as to_tf32, except for a NaN, which is in high
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kPairs)
      mma_m16n8k16_bf16(d, a, b);
    else
      mma_m16n8k8_tf32(d, a, b);
  }
};

// How a warp reads its share of an operand from shared memory.
// An mma's sum over k has no order. Lane q of four may take any k's, if it takes the same from a and b.
// Rows and columns have no order either, as long as the sums are written in the same order.
// Wide reads (BF16): lane q takes k = 2q and 2q + 1. If rows are contiguous, lane g of eight takes chunks of rows.
// The pairs of BF16 are packed into new registers anyway.
// TF32 reads one number at a time: an mma needs its registers in sequence, and moving wide ones there would cost more.
// Register r is then at k = q + 4 r.
template <class Operand, int rows, bool wide>  // of a lane
struct TensorReads {
  static constexpr bool kChunks = wide && !Operand::kAlongK;  // chunks of rows

  // The lane's row number i.
  static __device__ int row(int g, int i) { return kChunks ? i / 4 * 32 + g * 4 + i % 4 : i * 8 + g; }

  // x[i] = elements of row i. Wide: x[i][2 s + h] is at k + 8 s + 2 q + h.
  template <int n>
  static __device__ void read(float (&x)[rows][n], const float* tile, int first_row, int k) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    if constexpr (kChunks) {
#pragma unroll
      for (int s = 0; s < n; ++s)
#pragma unroll
        for (int i = 0; i < rows; i += 4) {
          const float* from = tile + (k + s / 2 * 8 + 2 * q + s % 2) * Operand::kStride + first_row + row(g, i);
          const auto chunk = load<true, 4>(from, 4);
#pragma unroll
          for (int e = 0; e < 4; ++e) x[i + e][s] = chunk.at[e];
        }
    } else {
#pragma unroll
      for (int i = 0; i < rows; ++i)
#pragma unroll
        for (int s = 0; s < n; s += 2) {
          const int line = first_row + row(g, i);
          if constexpr (wide) {
            const auto pair = load<true, 2>(tile + line * Operand::kStride + k + s * 4 + 2 * q, 2);
            x[i][s] = pair.at[0];
            x[i][s + 1] = pair.at[1];
          } else {
            x[i][s] = Operand::at(tile, line, k + q);
            x[i][s + 1] = Operand::at(tile, line, k + q + 4);
          }
        }
    }
  }
};

template <class Tile_, class Form_, bool dual, Numbers numbers>
struct TensorProduct {
  using T = float;
  using Tile = Tile_;
  using Form = Form_;
  using Block = typename Form::template Block<Tile>;
  using Word = TensorWord<numbers>;
  using A = Operand<T, typename Block::A, Tile::kRows, kChunk<T>, Tile::kThreads, Word::kPairs>;
  using B = Operand<T, typename Block::B, Tile::kCols, kChunk<T>, Tile::kThreads, Word::kPairs>;
  static constexpr int kBlocks = dual ? 3 : 0;  // 168 registers; the compiler would choose 128 and spill some
  static constexpr int kSets = dual ? 2 : 1;
  static constexpr int kStage = kSets * (A::kSize + B::kSize);
  static constexpr size_t kTableBytes = Form::kTable * Tile::kRows * 16, kSharedBytes = kTableBytes + Tile::kStages * kStage * sizeof(T);

  // A warp works on 16 x 8 pieces. A lane has two rows of each piece, and two registers of each row, in the order of device.h's mma_.
  static constexpr int kDown = Tile::kWarpRows / 16, kAcross = Tile::kWarpCols / 8, kK = 8 * Word::kNumbers;
  using Sum = T[kDown][kAcross][4];
  using ReadsA = TensorReads<A, kDown * 2, Word::kPairs>;
  using ReadsB = TensorReads<B, kAcross, Word::kPairs>;

  static __device__ int first_row() { return threadIdx.x / 32 / (Tile::kCols / Tile::kWarpCols) * Tile::kWarpRows; }
  static __device__ int first_col() { return threadIdx.x / 32 % (Tile::kCols / Tile::kWarpCols) * Tile::kWarpCols; }

  struct PiecesA {
    uint32_t high[kDown][4], low[Word::kSplit ? kDown : 1][4];

    __device__ void read(const T* tile, int k) {
      T x[kDown * 2][kK / 4];
      ReadsA::read(x, tile, first_row(), k);
#pragma unroll
      for (int m = 0; m < kDown; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const T* of = &x[m * 2 + r % 2][r / 2 * Word::kNumbers];
          high[m][r] = Word::high(of);
          if constexpr (Word::kSplit) low[m][r] = Word::low(of, high[m][r]);
        }
    }
  };
  struct PiecesB {
    uint32_t high[kAcross][2], low[Word::kSplit ? kAcross : 1][2];

    __device__ void read(const T* tile, int k) {
      T x[kAcross][kK / 4];
      ReadsB::read(x, tile, first_col(), k);
#pragma unroll
      for (int n = 0; n < kAcross; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const T* of = &x[n][r * Word::kNumbers];
          high[n][r] = Word::high(of);
          if constexpr (Word::kSplit) low[n][r] = Word::low(of, high[n][r]);
        }
    }
  };

  static __device__ void add_products(Sum& sum, const PiecesA& a, const PiecesB& b) {
#pragma unroll
    for (int m = 0; m < kDown; ++m)
#pragma unroll
      for (int n = 0; n < kAcross; ++n) {
        if constexpr (Word::kSplit) {  // the small products first
          Word::mma(sum[m][n], a.low[m], b.high[n]);
          Word::mma(sum[m][n], a.high[m], b.low[n]);
        }
        Word::mma(sum[m][n], a.high[m], b.high[n]);
      }
  }

  static __device__ void add_tile(Sum (&sum)[kSets], const T* tile) {
    const T* b_tile = tile + kSets * A::kSize;
#pragma unroll
    for (int k = 0; k < kDepth; k += kK) {
      PiecesA a;
      PiecesB b;
      a.read(tile, k);
      b.read(b_tile, k);
      add_products(sum[0], a, b);
      if constexpr (dual) {
        PiecesA other_a;
        PiecesB other_b;
        other_b.read(b_tile + B::kSize, k);
        add_products(sum[1], a, other_b);
        other_a.read(tile + A::kSize, k);
        add_products(sum[1], other_a, b);
      }
    }
  }

  // The lane's share of `out`, as in TileProduct. If it took chunks of b's rows, neighbouring columns are from as many pieces.
  // Otherwise they are the two columns of one piece.
  static constexpr bool kChunks = ReadsB::kChunks;
  static constexpr int kLines = kDown * 2, kSide = kChunks ? 4 : 2, kSpans = kAcross * 2 / kSide;
  static __device__ int line(int i) { return first_row() + ReadsA::row(threadIdx.x % 32 / 4, i); }
  static __device__ int span(int j) {
    const int q = threadIdx.x % 4;
    return first_col() + (kChunks ? ReadsB::row(2 * q + j % 2, j / 2 * 4) : ReadsB::row(2 * q, j));
  }
  static __device__ T at(const Sum& sum, int i, int j, int e) {
    return kChunks ? sum[i / 2][j / 2 * 4 + e][i % 2 * 2 + j % 2] : sum[i / 2][j][i % 2 * 2 + e];
  }
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
