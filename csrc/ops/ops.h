// THE waist. A backend is one table of functions, filled from the list in program/op.h.
// Code above speaks Schedules. Code below sees pointers and sizes and knows nothing of MAML.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "ops/workspace.h"
#include "program/schedule.h"

namespace fastmaml {

// One operand for a run of tasks.
// Task-major (lanes = 1): element i of task t is data[t * task_stride + i]. With task_stride 0 all tasks share the operand.
// Lane-interleaved (lanes = L): data[(t / L) * task_stride * L + i * L + t % L].
struct View {
  void* data = nullptr;     // null: absent
  int64_t task_stride = 0;  // elements
  int lanes = 1;

  explicit operator bool() const { return data != nullptr; }
};

// A task's elements: element i is data[i * stride].
template <class T>
struct Elements {
  T* data;
  int64_t stride;
  T& operator[](int64_t i) const { return data[i * stride]; }
  explicit operator bool() const { return data != nullptr; }
};

template <class T>
Elements<T> elements(const View& view, int64_t task) {
  if (!view.data) return {nullptr, 1};
  T* data = static_cast<T*>(view.data);
  if (view.lanes == 1) return {data + task * view.task_stride, 1};
  return {data + task / view.lanes * view.task_stride * view.lanes + task % view.lanes, view.lanes};
}

struct Call {
  const Step& step;
  const Layer& layer;
  const View* operand;  // in the order of program/op.h
  int64_t tasks;
  void* scratch;     // scratch_bytes(step, layer) bytes, 64-byte aligned; null where that is 0
  uintptr_t stream;  // the device's stream; unused on the CPU

  template <class Shape>
  const Shape& shape() const {
    return std::get<Shape>(layer);
  }
  const View& operator[](int i) const { return operand[i]; }
};

using OpFn = void (*)(const Call&);
using ScratchFn = size_t (*)(const Step&, const Layer&);

// Functions of a backend with its own memory and queue. Its ops return before their work is done; a stream orders them.
struct Device {
  struct Piece {
    void* to;
    const void* from;
    size_t bytes;  // a multiple of 4, as the addresses are
  };
  int (*use)(int index);                                           // makes a device the thread's current one; returns the previous one
  void (*copy)(const Piece* pieces, int count, uintptr_t stream);  // copies within device memory
  // out[r][i] = x[r][index[i]]         out, x [rows, size]   index [size]
  void (*gather)(void* out, const void* x, const int32_t* index, int64_t rows, int64_t size, uintptr_t stream);

  // Ops called by this thread on begin_recording's stream are recorded and not run. end_recording returns the recording.
  // replay runs the recording with the same addresses, any number of times. If an op has thrown, end_recording may throw too.
  uintptr_t (*begin_recording)();
  void* (*end_recording)();
  void (*replay)(void* recording, uintptr_t stream);
  void (*forget)(void* recording);
  bool (*is_recorded)(uintptr_t stream);  // by other code, such as torch
};

// A Schedule encoded for a kernel that walks all Steps in one launch. Each task has its own fast memory. Plain bytes
// and sizes.
struct ResidentCode {
  std::string refusal = {};                       // one sentence: why the kernel cannot walk this Schedule; empty: it can
  std::vector<std::byte> steps = {};              // input of the kernel; pass launch() a copy in device memory
  int count = 0;                                  // number of encoded Steps
  unsigned threads = 0;                           // threads for one task
  size_t shared_bytes = 0;                        // fast memory for one task
  size_t arena_bytes = 0;                         // device memory for one task: slots that do not fit into fast memory
  std::array<uint8_t, kArgs> element_bytes = {};  // element size of each argument
};

// How a backend walks a Schedule in one launch. The alternative is run_layered.
struct ResidentWalk {
  size_t (*fast_bytes)();  // fast memory of one block on the current device
  ResidentCode (*encode)(const Schedule& schedule, size_t fast_bytes);
  // steps: a copy of code.steps. arena: tasks x code.arena_bytes, 64-byte aligned. Both in device memory. args: [kArgs]
  void (*launch)(const ResidentCode& code, const void* steps, const View* args, void* arena, int64_t tasks, uintptr_t stream);
};

struct OpTable;
struct Program;

// The same backend's ops on tasks in lanes, for Schedules of lane_schedule().
struct LaneOps {
  const OpTable* table;
  bool (*run)(const Program& net);                         // does the table have all ops of this network?
  bool (*pays_off)(const Program& net, int64_t examples);  // are lanes faster? The number of tasks and threads must not matter
};

inline constexpr int kAnyLanes = 0;

struct OpTable {
  const char* backend = "";
  size_t real_bytes = 4;                   // 4: float, 8: double
  int lanes = 1;                           // tasks side by side in its Views; kAnyLanes: any number
  bool rectifies = false;                  // its linear, conv2d and group_norm take in a rectifier (Rectified in layers.h)
  bool out_in = false;                     // its linear ops read weights only as [out, in] (Linear::out_in)
  const Device* device = nullptr;          // null: the host, where a task walks alone; else all tasks walk together
  OpFn run[kOps] = {};                     // null: this backend lacks the op
  ScratchFn scratch[kOps] = {};            // null: no scratch
  const ResidentWalk* resident = nullptr;  // null: this backend has none
  const LaneOps* in_lanes = nullptr;       // null: this backend has none
  // out[i] = sum_t w[t] x[t][i] (w null: the mean) by a fixed binary tree over t. x [T, size] is overwritten. `stride`:
  // from task to task.
  // On the host `size` may be a part of a task's vector, so that threads can share the work. A device takes whole vectors.
  void (*tree_reduce)(void* out, void* x, const void* w, int64_t tasks, int64_t size, int64_t stride, uintptr_t stream) = nullptr;
  void (*tree_add)(void* a, const void* b, int64_t size) = nullptr;  // a += b, one node of that tree; on the host

  bool supports(Op op) const { return run[static_cast<int>(op)] != nullptr; }
};

const OpTable& reference_ops();             // float64, plain loops: the definition
const OpTable& cpu_ops(size_t real_bytes);  // for this machine's best instruction set, or the one of set_cpu_isa

// Runs body(0) .. body(n - 1), in any order, possibly at the same time. The caller owns the threads.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t)>& body)>;

// Scratch that outlives calls: one arena for each worker, grown on first use and then kept.
class Arenas {
 public:
  ~Arenas();
  std::byte* get(int worker, size_t bytes);  // not thread-safe across workers that share an index
  void reserve(int workers, size_t bytes);
  int64_t allocations() const { return allocations_; }
  size_t high_water() const { return high_water_; }

 private:
  struct Block {
    std::byte* data = nullptr;
    size_t bytes = 0;
  };
  std::vector<Block> blocks_;
  int64_t allocations_ = 0;
  size_t high_water_ = 0;
};

class StepClock;  // step_clock.h
class TreeSum;    // tree_sum.h

struct Run {
  const OpTable& table;
  const Schedule& schedule;
  const Workspace& workspace;
  const View* args;  // [kArgs]
  int64_t tasks;
  int lanes = 1;  // layout of the arena
  uintptr_t stream = 0;
  std::function<void(const Call&)> python_loss = {};  // a loss written in Python (op.h), called for all tasks at once
  // run_resident only: called before tasks `[first, first + count)` by the worker that walks them. Returning false
  // skips them.
  std::function<bool(int64_t first, int64_t count)> before = {};
  std::deque<TreeSum>* sums = nullptr;  // run_resident only: results that are summed over tasks, written here and not to `args`
  StepClock* clocks = nullptr;          // one for each worker, to time every Step
};

// Runs every Step once over all tasks. The arena holds all tasks at once.
void run_layered(const Run& run, Arenas& arenas);
void run_layered(const Run& run, std::byte* arena);  // arena: layered_bytes(run), 64-byte aligned, in the backend's memory
size_t layered_bytes(const Run& run);

// One worker walks a task (or a group of `lanes` tasks) through the whole list, in one arena. Takes no loss written in
// Python.
void run_resident(const Run& run, Arenas& arenas, int workers, const ParallelFor& parallel_for);

// For a loss written in Python. Between two calls of the loss, works as run_resident.
// At the loss all tasks wait, and the calling thread runs Run::python_loss for all of them. The arena holds all tasks at once.
void run_segments(const Run& run, Arenas& arenas, int workers, const ParallelFor& parallel_for);

}  // namespace fastmaml
