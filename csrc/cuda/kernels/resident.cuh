// The resident walk: a block takes one task through a whole Schedule, Step after Step. Its numbers are in shared memory as far as they fit.
// Steps come encoded (resident_step.cuh), a stage at a time: up to kStageSteps independent Steps, then a barrier.
// While a stage runs, the next one is copied to shared memory.
#pragma once

#include "cuda/kernels/batch_norm.cuh"
#include "cuda/kernels/group_norm.cuh"
#include "cuda/kernels/loss.cuh"
#include "cuda/kernels/resident_product.cuh"
#include "cuda/kernels/resident_step.cuh"
#include "cuda/map_ops.h"

namespace fastmaml::FASTMAML_CUDA_NS {

// ---------------------------------------------------------------- vectors

template <class T, class F, int... outs, int... ins>
__device__ __forceinline__ MapOperands<T, F> map_operands(const Here& here, At<outs...>, At<ins...>) {
  return {{here.per_task<T>(outs)...}, {here.per_task<const T>(ins)...}};
}
template <int... outs, int... ins>
__device__ __forceinline__ bool map_aligned(const Here& here, At<outs...>, At<ins...>) {
  return Here::aligned(here.operand<const void>(outs)..., here.operand<const void>(ins)...);
}

template <class Map>
FASTMAML_NOINLINE __device__ void map_step(Here here) {
  using T = typename Map::T;
  using F = typename Map::Function;
  F f = here.settings<F>();
  if constexpr (Map::kNumber >= 0) {
    if (const T* number = here.operand<const T>(Map::kNumber)) f.number = *number;
    f.begin();
  }
  map_chunks(f, map_operands<T, F>(here, typename Map::Outs(), typename Map::Ins()), 0, threadIdx.x, blockDim.x, here.step.size,
             map_aligned(here, typename Map::Outs(), typename Map::Ins()));
}

template <class T, Op op>
__device__ __forceinline__ void pointwise_step(const Here& here) {
  if (here.step.smooth)
    map_step<PointwiseOp<T, op, Smoothing<T>>>(here);
  else
    map_step<PointwiseOp<T, op, Rectifying<T>>>(here);
}

template <class T>
FASTMAML_NOINLINE __device__ void transpose_step(Here here) {
  const TransposeSettings s = here.settings<TransposeSettings>();
  T* const out = here.operand<T>(0);
  const T* const x = here.operand<const T>(1);
  for (int i = threadIdx.x; i < s.N * s.rows * s.cols; i += blockDim.x) {
    const int col = i % s.cols, row = i / s.cols % s.rows, n = i / s.cols / s.rows;
    out[(n * s.cols + col) * s.rows + row] = x[i];
  }
}

// ---------------------------------------------------------------- linear. Operands: out out' a a' b b' bias bias' sums

template <class T, Order order_a, Order order_b, bool dual>
FASTMAML_NOINLINE __device__ void product_step(Here here) {
  const auto in = [&](int i) { return here.operand<const T>(i); };
  const ResidentProduct<T> p{{here.operand<T>(0), here.operand<T>(1)}, {in(2), in(3)}, {in(4), in(5)}, {in(6), in(7)}, here.operand<T>(8)};
  const bool aligned = Here::aligned(p.out[0], p.out[1], p.a[0], p.a[1], p.b[0], p.b[1]);
  // A stage's second product starts with the threads that had least work in the first.
  const int rank = here.step.in_turn % 2 ? (threadIdx.x + blockDim.x / 64 * 32) % blockDim.x : threadIdx.x;
  multiply<T, order_a, order_b, dual>(p, here.settings<ResidentTiles>(), aligned, rank);
}

// ---------------------------------------------------------------- [rows, C] with numbers for every column

template <class T, class F>
__device__ __forceinline__ void map_columns_here(const F& f, const Columns& s, bool wide) {
  const int across = s.lanes * kChunk<T>;
  for (int group = 0; group * across < s.C; ++group) {
    const ColumnThread<T> t(s, 0, group);
    if (t.count == 0) continue;
    if (wide)
      f.template run<true>(0, t);
    else
      f.template run<false>(0, t);
  }
}

// out0, out1 [C] = scale times the sums of f's two numbers over the rows
template <class T, class F>
__device__ __forceinline__ void sum_columns_here(const Here& here, const F& f, T* out0, T* out1, double scale, const Columns& s,
                                                 bool wide) {
  auto& shared = here.scratch<ColumnSums<T>>();
  const int across = s.lanes * kChunk<T>;
  for (int group = 0; group * across < s.C; ++group) {
    const ColumnThread<T> t(s, 0, group);
    if (group > 0) __syncthreads();  // `shared` is written again
    sum_columns_of_part<2, T>(shared, f, 0, s, t, wide);
    if (t.row_lane > 0) continue;
    for (int j = 0; j < t.count; ++j) {
      out0[t.c + j] = T(scale * shared[0][j][threadIdx.x]);
      out1[t.c + j] = T(scale * shared[1][j][threadIdx.x]);
    }
  }
}

template <class T>
FASTMAML_NOINLINE __device__ void batch_norm_stats_step(Here here) {
  const ColumnSettings& s = here.settings<ColumnSettings>();
  const Columns& c = s.columns;
  auto& shared = here.scratch<ColumnMoments<T>>();
  T* const stats = here.operand<T>(0);
  const T* const x = here.operand<const T>(1);
  const bool wide = Here::aligned(x) && c.C % kChunk<T> == 0;
  for (int group = 0; group * c.lanes * kChunk<T> < c.C; ++group) {
    const ColumnThread<T> t(c, 0, group);
    if (group > 0) __syncthreads();  // `shared` is written again
    const Chunk<T> shift = channels(x, t.c, t.count, T(0));
    column_moments_of_part<4>(shared, x, shift, c, t, wide);
    if (t.row_lane > 0) continue;
    for (int j = 0; j < t.count; ++j)
      write_stats(stats, t.c + j, c.C, double(shift.at[j]) + shared.means[j][threadIdx.x], shared.squares[j][threadIdx.x] / double(c.rows),
                  s.eps);
  }
}

template <class T>
FASTMAML_NOINLINE __device__ void batch_norm_frozen_stats_step(Here here) {
  const ColumnSettings& s = here.settings<ColumnSettings>();
  const T *const mean = here.operand<const T>(1), *const var = here.operand<const T>(2);
  for (int c = threadIdx.x; c < s.columns.C; c += blockDim.x)
    write_stats(here.operand<T>(0), c, s.columns.C, double(mean[c]), double(var[c]), s.eps);
}

template <class T>
FASTMAML_NOINLINE __device__ void batch_norm_stats_jvp_step(Here here) {
  const ColumnSettings& s = here.settings<ColumnSettings>();
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool wide = Here::aligned(in(1).data, in(2).data) && s.columns.C % kChunk<T> == 0;
  T* const out = here.operand<T>(0);
  sum_columns_here(here, BatchNormStatsJvp<T>{in(1), in(2), in(3), s.columns.C}, out, out + s.columns.C, s.scale, s.columns, wide);
}

template <class T>
FASTMAML_NOINLINE __device__ void batch_norm_fwd_step(Here here) {
  const Columns& s = here.settings<ColumnSettings>().columns;
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool wide = Here::aligned(in(0).data, in(1).data) && s.C % kChunk<T> == 0;
  map_columns_here<T>(BatchNormFwd<T>{here.per_task<T>(0), in(1), in(2), in(3), in(4), s.C}, s, wide);
}

template <class T>
FASTMAML_NOINLINE __device__ void batch_norm_fwd_jvp_step(Here here) {
  const Columns& s = here.settings<ColumnSettings>().columns;
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool wide = Here::aligned(in(0).data, in(1).data, in(2).data) && s.C % kChunk<T> == 0;
  map_columns_here<T>(BatchNormFwdJvp<T>{here.per_task<T>(0), in(1), in(2), in(3), in(4), in(5), in(6), in(7), s.C}, s, wide);
}

template <class T>
FASTMAML_NOINLINE __device__ void batch_norm_bwd_weight_step(Here here) {
  const Columns& s = here.settings<ColumnSettings>().columns;
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool wide = Here::aligned(in(2).data, in(3).data) && s.C % kChunk<T> == 0;
  sum_columns_here(here, BatchNormBwdWeight<T>{in(2), in(3), in(4), s.C}, here.operand<T>(0), here.operand<T>(1), 1.0, s, wide);
}

template <class T>
FASTMAML_NOINLINE __device__ void batch_norm_bwd_weight_jvp_step(Here here) {
  const Columns& s = here.settings<ColumnSettings>().columns;
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool wide = Here::aligned(in(2).data, in(3).data, in(4).data, in(5).data) && s.C % kChunk<T> == 0;
  const BatchNormBwdWeightJvp<T> f{in(2), in(3), in(4), in(5), in(6), in(7), s.C};
  sum_columns_here(here, f, here.operand<T>(0), here.operand<T>(1), 1.0, s, wide);
}

template <class T>
FASTMAML_NOINLINE __device__ void batch_norm_bwd_data_step(Here here) {
  const ColumnSettings& s = here.settings<ColumnSettings>();
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool wide = Here::aligned(in(0).data, in(1).data, in(2).data) && s.columns.C % kChunk<T> == 0;
  const BatchNormBwdData<T> f{here.per_task<T>(0), in(1), in(2), in(3), in(4), in(5), in(6), s.columns.C, s.inside_rows, T(s.scale)};
  map_columns_here<T>(f, s.columns, wide);
}

template <class T>
FASTMAML_NOINLINE __device__ void batch_norm_bwd_data_jvp_step(Here here) {
  const ColumnSettings& s = here.settings<ColumnSettings>();
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool wide = Here::aligned(in(0).data, in(1).data, in(2).data, in(3).data, in(4).data) && s.columns.C % kChunk<T> == 0;
  const BatchNormBwdDataJvp<T> f{
      here.per_task<T>(0), in(1),         in(2),     in(3), in(4), in(5), in(6), in(7), in(8), in(9), in(10), in(11), in(12),
      s.columns.C,         s.inside_rows, T(s.scale)};
  map_columns_here<T>(f, s.columns, wide);
}

// ---------------------------------------------------------------- groups: a warp for each

template <class T, class F>
__device__ __forceinline__ void map_groups_here(const F& f, const Groups& s, bool wide) {
  for (int group = threadIdx.x / 32; group < s.count(); group += blockDim.x / 32) {
    if (wide)
      f.template run<WarpTeam, true>(0, s, group);
    else
      f.template run<WarpTeam, false>(0, s, group);
  }
}

template <class T>
FASTMAML_NOINLINE __device__ void group_norm_fwd_step(Here here) {
  const GroupSettings& s = here.settings<GroupSettings>();
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool wide = Here::aligned(in(0).data, in(2).data) && s.groups.width % kChunk<T> == 0;
  map_groups_here<T>(GroupNormFwd<T>{here.per_task<T>(0), here.per_task<T>(1), in(2), in(3), in(4), s.eps}, s.groups, wide);
}

template <class T>
FASTMAML_NOINLINE __device__ void group_norm_fwd_jvp_step(Here here) {
  const Groups& s = here.settings<GroupSettings>().groups;
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool wide = Here::aligned(in(0).data, in(2).data, in(3).data) && s.width % kChunk<T> == 0;
  map_groups_here<T>(GroupNormFwdJvp<T>{here.per_task<T>(0), here.per_task<T>(1), in(2), in(3), in(4), in(5), in(6), in(7)}, s, wide);
}

template <class T>
FASTMAML_NOINLINE __device__ void group_norm_bwd_step(Here here) {
  const GroupSettings& s = here.settings<GroupSettings>();
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool aligned = Here::aligned(in(0).data, in(3).data, in(4).data);
  if (here.operand<T>(0))
    map_groups_here<T>(GroupNormBwdData<T>{here.per_task<T>(0), in(3), in(4), in(5), in(6)}, s.groups,
                       aligned && s.groups.width % kChunk<T> == 0);
  sum_columns_here(here, GroupNormBwdWeight<T>{in(3), in(4), in(5), s.groups}, here.operand<T>(1), here.operand<T>(2), 1.0, s.columns,
                   aligned && s.groups.channels % kChunk<T> == 0);
}

template <class T>
FASTMAML_NOINLINE __device__ void group_norm_bwd_jvp_step(Here here) {
  const GroupSettings& s = here.settings<GroupSettings>();
  const auto in = [&](int i) { return here.per_task<const T>(i); };
  const bool aligned = Here::aligned(in(0).data, in(3).data, in(4).data, in(5).data, in(6).data);
  if (here.operand<T>(0))
    map_groups_here<T>(GroupNormBwdDataJvp<T>{here.per_task<T>(0), in(3), in(4), in(5), in(6), in(7), in(8), in(9), in(10)}, s.groups,
                       aligned && s.groups.width % kChunk<T> == 0);
  const GroupNormBwdWeightJvp<T> f{in(3), in(4), in(5), in(6), in(7), in(8), s.groups};
  sum_columns_here(here, f, here.operand<T>(1), here.operand<T>(2), 1.0, s.columns, aligned && s.groups.channels % kChunk<T> == 0);
}

// ---------------------------------------------------------------- losses, clipping, conjugate gradients

template <class T>
FASTMAML_NOINLINE __device__ void cross_entropy_step(Here here) {
  const LossSettings& s = here.settings<LossSettings>();
  cross_entropy_of_task(here.operand<T>(0), here.operand<T>(1), here.operand<const T>(2), here.operand<const int64_t>(3),
                        here.operand<const T>(4), s.smoothing, s.examples);
}
template <class T>
FASTMAML_NOINLINE __device__ void cross_entropy_jvp_step(Here here) {
  const Examples& s = here.settings<LossSettings>().examples;
  cross_entropy_jvp_of_task(here.operand<T>(0), here.operand<const T>(1), here.operand<const T>(2), here.operand<const T>(4), s, 0,
                            blockDim.x / s.lanes);
}
template <class T>
FASTMAML_NOINLINE __device__ void mse_step(Here here) {
  const Examples& s = here.settings<LossSettings>().examples;
  mse_of_task(here.operand<T>(0), here.operand<T>(1), here.operand<const T>(2), here.operand<const T>(3), here.operand<const T>(4), s.N,
              s.size);
}
template <class T>
FASTMAML_NOINLINE __device__ void mse_jvp_step(Here here) {
  const Examples& s = here.settings<LossSettings>().examples;
  mse_jvp_of_task(here.operand<T>(0), here.operand<const T>(2), here.operand<const T>(4), s.N, s.size, threadIdx.x, blockDim.x);
}

template <class T>
FASTMAML_NOINLINE __device__ void clip_norm_step(Here here) {
  T* const clipped = here.operand<T>(0);
  const T *const g = here.operand<const T>(1), *const mask = here.operand<const T>(2);
  clip_norm_of_task(clipped, g, mask, here.settings<ClipSettings>().limit, here.step.size, Here::aligned(clipped, g, mask));
}
template <class T>
FASTMAML_NOINLINE __device__ void clip_norm_adjoint_step(Here here) {
  T* const u_raw = here.operand<T>(0);
  const T *const u = here.operand<const T>(1), *const g = here.operand<const T>(2), *const mask = here.operand<const T>(3);
  clip_norm_adjoint_of_task(u_raw, u, g, mask, here.settings<ClipSettings>().limit, here.step.size, Here::aligned(u_raw, u, g, mask));
}

template <class T>
FASTMAML_NOINLINE __device__ void cg_start_step(Here here) {
  T *const s = here.operand<T>(0), *const r = here.operand<T>(1), *const p = here.operand<T>(2);
  const T* const v = here.operand<const T>(5);
  cg_start_of_task(s, r, p, here.operand<T>(3), here.operand<T>(4), v, here.step.size, Here::aligned(s, r, p, v));
}
template <class T>
FASTMAML_NOINLINE __device__ void cg_step_step(Here here) {
  T *const s = here.operand<T>(0), *const r = here.operand<T>(1), *const p = here.operand<T>(2);
  const T* const hp = here.operand<const T>(5);
  cg_step_of_task(s, r, p, here.operand<T>(3), here.operand<T>(4), hp, here.operand<const T>(6), here.step.size,
                  Here::aligned(s, r, p, hp));
}

// ---------------------------------------------------------------- the walk

// The ops of the walk. resident_code.cu declines all others.
template <class T>
__device__ __forceinline__ void run_step(const Here& here) {
  switch (here.step.op) {
#define FASTMAML_MAP(op) \
  case Op::op:           \
    return map_step<MapOp<T, Op::op>>(here);
    FASTMAML_RESIDENT_MAPS(FASTMAML_MAP)
#undef FASTMAML_MAP
    case Op::pointwise_fwd:
      return pointwise_step<T, Op::pointwise_fwd>(here);
    case Op::pointwise_fwd_jvp:
    case Op::pointwise_bwd:
      return pointwise_step<T, Op::pointwise_bwd>(here);
    case Op::pointwise_bwd_jvp:
      return pointwise_step<T, Op::pointwise_bwd_jvp>(here);
    case Op::flatten_fwd:
    case Op::flatten_bwd:
      return transpose_step<T>(here);
    case Op::linear_fwd:
      return product_step<T, Order::along_k, Order::along_rows, false>(here);
    case Op::linear_fwd_dual:
      return product_step<T, Order::along_k, Order::along_rows, true>(here);
    case Op::linear_bwd_data:
      return product_step<T, Order::along_k, Order::along_k, false>(here);
    case Op::linear_bwd_data_dual:
      return product_step<T, Order::along_k, Order::along_k, true>(here);
    case Op::linear_bwd_weight:
      return product_step<T, Order::along_rows, Order::along_rows, false>(here);
#define FASTMAML_STEP(op) \
  case Op::op:            \
    return op##_step<T>(here);
      FASTMAML_RESIDENT_STEPS(FASTMAML_STEP)
#undef FASTMAML_STEP
    default:  // resident_code.cu made no such Step
      no_such_case();
  }
}

struct ResidentArgs {
  unsigned char* data[kArgs];
  int64_t task_stride[kArgs];  // bytes
};

// steps: `count` Steps, then kStageSteps empty ones. In shared memory the scratch lies at scratch_at, after the slots.
template <class T>
__global__ void __launch_bounds__(kResidentThreads, 2)
    resident(const ResidentStep* steps, int count, ResidentArgs args, unsigned char* arena, int64_t arena_bytes, int scratch_at) {
  FASTMAML_SHARED;
  __shared__ ResidentStep stages[2][kStageSteps];
  __shared__ unsigned char* memory[kMemories];
  const int64_t task = blockIdx.x;
  const auto fetch = [&](int stage, int first) {
    constexpr int kPieces = int(sizeof(ResidentStep)) * kStageSteps / 16;
    for (int i = threadIdx.x; i < kPieces; i += blockDim.x)
      async_copy16(reinterpret_cast<unsigned char*>(stages[stage]) + 16 * i,
                   reinterpret_cast<const unsigned char*>(steps + first) + 16 * i);
    async_commit();
  };

  fetch(0, 0);
  for (int m = threadIdx.x; m < kMemories; m += blockDim.x)
    memory[m] = m == kInShared    ? shared_bytes
                : m == kInScratch ? shared_bytes + scratch_at
                : m == kInArena   ? arena + task * arena_bytes
                                  : args.data[m - kFirstArg] + task * args.task_stride[m - kFirstArg];
  async_wait<0>();
  __syncthreads();
  for (int first = 0, stage = 0; first < count; stage ^= 1) {
    const int together = stages[stage][0].stage;
    first += together;
    fetch(stage ^ 1, first);
    for (int i = 0; i < together; ++i) run_step<T>({stages[stage][i], memory});
    async_wait<0>();
    __syncthreads();
  }
}

}  // namespace fastmaml::FASTMAML_CUDA_NS
