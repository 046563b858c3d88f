// One encoded Step of the resident walk (kernels/resident.cuh): op, settings, and places of operands. Plain bytes.
// resident_code.cu writes them.
#pragma once

#include "cuda/kernels/columns.cuh"
#include "cuda/kernels/group_norm.cuh"
#include "cuda/kernels/loss.cuh"
#include "cuda/kernels/resident_product.cuh"
#include "program/schedule.h"

namespace fastmaml::FASTMAML_CUDA_NS {

inline constexpr int kResidentThreads = kColumnThreads;  // at most
inline constexpr int kStageSteps = 4;                    // at most; Steps of one stage are independent

// A task's memories: shared memory, its part of the arena, the scratch of column sums in shared memory, and the arguments.
inline constexpr int kInShared = 0, kInArena = 1, kInScratch = 2, kFirstArg = 3, kMemories = kFirstArg + kArgs;

struct Place {
  int32_t memory = -1;  // -1: absent
  uint32_t offset = 0;  // bytes from the start of the task's numbers
};

struct alignas(16) ResidentStep {
  Op op = Op::fill_zero;
  uint8_t stage = 1;                           // in a stage's first Step: the number of Steps in the stage
  uint8_t smooth = 0;                          // pointwise ops; 0: a rectifier (map_ops.h)
  uint8_t in_turn = 0;                         // place of the Step in its stage
  int32_t size = 0;                            // ops of map_ops.h: how many numbers
  alignas(8) unsigned char settings[64] = {};  // a function of map_ops.h, ResidentTiles, or a struct below
  Place place[kMaxOperands];
};
static_assert(sizeof(ResidentStep) % 16 == 0, "copied in pieces of 16 bytes");

// The ops of the walk: first those of map_ops.h, then those with their own function.
// Pointwise ops, flatten and the products of linear are listed elsewhere, because they have fewer forms.
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
  int inside_rows;    // batch norm: rows that give the statistics and take part in their gradient
  double eps, scale;  // scale: 1 / rows that give the statistics
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

// A Step as one thread sees it.
struct Here {
  const ResidentStep& step;
  unsigned char* const* memory;  // [kMemories], for this task

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
  // May these operands (null: absent) be read and written in chunks?
  template <class... T>
  static __device__ bool aligned(const T*... operands) {
    return ((reinterpret_cast<uint64_t>(operands) | ...) & 15) == 0;
  }
};

}  // namespace fastmaml::FASTMAML_CUDA_NS
