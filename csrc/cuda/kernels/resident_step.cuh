// What the resident walk (kernels/resident.cuh) knows of a Step: its op, its settings, and where its operands lie. Plain bytes, written by
// resident_code.cu.
#pragma once

#include "cuda/kernels/columns.cuh"
#include "cuda/kernels/group_norm.cuh"
#include "cuda/kernels/loss.cuh"
#include "cuda/kernels/resident_product.cuh"
#include "program/schedule.h"

namespace fastmaml::FASTMAML_CUDA_NS {

inline constexpr int kResidentThreads = kColumnThreads;  // at most
inline constexpr int kStageSteps = 4;                    // at most; Steps of a stage do not wait for each other

// The memories of a task: shared memory, its piece of the arena, what column sums take of shared memory, and the arguments.
inline constexpr int kInShared = 0, kInArena = 1, kInScratch = 2, kFirstArg = 3, kMemories = kFirstArg + kArgs;

struct Place {
  int32_t memory = -1;  // -1: absent
  uint32_t offset = 0;  // bytes from where the task's numbers start
};

struct alignas(16) ResidentStep {
  Op op = Op::fill_zero;
  uint8_t stage = 1;                           // the first of a stage: how many Steps it has
  uint8_t smooth = 0;                          // pointwise ops: 0 rectifies (map_ops.h)
  uint8_t in_turn = 0;                         // its place in the stage
  int32_t size = 0;                            // ops of map_ops.h: numbers
  alignas(8) unsigned char settings[64] = {};  // a function of map_ops.h, ResidentTiles, or a struct below
  Place place[kMaxOperands];
};
static_assert(sizeof(ResidentStep) % 16 == 0, "copied in pieces of 16 bytes");

// The ops it has, beside the pointwise ones, flatten and the products of linear, which come in fewer forms: those of map_ops.h, and those
// whose Step is a function of its own.
#define FASTMAML_RESIDENT_MAPS(X) \
  X(fill_zero)                    \
  X(copy)                         \
  X(add)                          \
  X(axpy)                         \
  X(sgd_update)                   \
  X(scale_by_rate)                \
  X(rate_grad)                    \
  X(adjoint_update)               \
  X(sgd_adjoint)                  \
  X(proximal)                     \
  X(clip_value)                   \
  X(clip_value_adjoint)           \
  X(momentum_update)              \
  X(momentum_adjoint)             \
  X(adam_update)                  \
  X(adam_adjoint)
#define FASTMAML_RESIDENT_STEPS(X) \
  X(batch_norm_stats)              \
  X(batch_norm_frozen_stats)       \
  X(batch_norm_stats_jvp)          \
  X(batch_norm_fwd)                \
  X(batch_norm_fwd_jvp)            \
  X(batch_norm_bwd_weight)         \
  X(batch_norm_bwd_weight_jvp)     \
  X(batch_norm_bwd_data)           \
  X(batch_norm_bwd_data_jvp)       \
  X(group_norm_fwd)                \
  X(group_norm_fwd_jvp)            \
  X(group_norm_bwd)                \
  X(group_norm_bwd_jvp)            \
  X(cross_entropy)                 \
  X(cross_entropy_jvp)             \
  X(mse)                           \
  X(mse_jvp)                       \
  X(clip_norm)                     \
  X(clip_norm_adjoint)             \
  X(cg_start)                      \
  X(cg_step)

struct ColumnSettings {  // ops on [rows, C] with numbers for every column
  Columns columns;
  int inside_rows;    // batch norm: that made the statistics and take part in their gradient
  double eps, scale;  // scale: 1 / rows that made the statistics
};
struct GroupSettings {
  Groups groups;
  Columns columns;
  double eps;
};
struct LossSettings {
  Examples examples;
  double smoothing;
};
struct TransposeSettings {  // out [N, cols, rows] = x [N, rows, cols]
  int N, rows, cols;
};
struct ClipSettings {
  double limit;
};

// A Step in the hands of a thread.
struct Here {
  const ResidentStep& step;
  unsigned char* const* memory;  // [kMemories], of this task

  template <class T>
  __device__ T* operand(int i) const {
    const Place place = step.place[i];
    return place.memory < 0 ? nullptr : reinterpret_cast<T*>(memory[place.memory] + place.offset);
  }
  template <class Sums>  // ColumnSums or ColumnMoments
  __device__ Sums& scratch() const {
    return *reinterpret_cast<Sums*>(memory[kInScratch]);
  }
  template <class T>
  __device__ PerTask<T> per_task(int i) const {
    return {operand<T>(i), 0};
  }
  template <class S>
  __device__ const S& settings() const {
    static_assert(sizeof(S) <= sizeof step.settings);
    return *reinterpret_cast<const S*>(step.settings);
  }
  // May these operands (null: absent) be accessed in chunks?
  template <class... T>
  static __device__ bool aligned(const T*... operands) {
    return ((reinterpret_cast<uint64_t>(operands) | ...) & 15) == 0;
  }
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
