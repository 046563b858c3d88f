// THE waist. A backend is one table of functions, filled from the list in program/op.h; everything above speaks Schedules,
// everything below sees pointers and sizes and knows nothing of MAML.
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

// One operand for a run of tasks. Task-major (lanes = 1): element i of task t is data[t * task_stride + i]; task_stride 0 is
// shared by all tasks. Lane-interleaved (lanes = L): data[(t / L) * task_stride * L + i * L + t % L].
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

// What a backend offers whose memory or queue is not the host's. Its ops return before their work is done; a stream orders them.
struct Device {
  struct Piece {
    void* to;
    const void* from;
    size_t bytes;  // a multiple of 4, as are the addresses
  };
  int (*use)(int index);                                           // makes a device the thread's current one; returns the one before
  void (*copy)(const Piece* pieces, int count, uintptr_t stream);  // of device memory
  // out[r][i] = x[r][index[i]]         out, x [rows, size]   index [size]
  void (*gather)(void* out, const void* x, const int32_t* index, int64_t rows, int64_t size, uintptr_t stream);

  // Ops that this thread calls on begin_recording's stream are not run: end_recording returns them as one thing that replay runs,
  // with the same addresses, as often as one likes. After an op has thrown, end_recording may throw as well.
  uintptr_t (*begin_recording)();
  void* (*end_recording)();
  void (*replay)(void* recording, uintptr_t stream);
  void (*forget)(void* recording);
  bool (*is_recorded)(uintptr_t stream);  // by somebody else
};

// A Schedule encoded for a kernel that walks all of it in one launch, a task alone in fast memory. Plain bytes and sizes.
struct ResidentCode {
  std::string refusal = {};                       // why this Schedule is not walked so, in one sentence; empty: it is
  std::vector<std::byte> steps = {};              // what the kernel reads: a copy of it in the device's memory goes to launch()
  int count = 0;                                  // of Steps in it
  unsigned threads = 0;                           // that share a task
  size_t shared_bytes = 0;                        // of a task's fast memory
  size_t arena_bytes = 0;                         // of a task, in the device's memory: what fast memory has no room for
  std::array<uint8_t, kArgs> element_bytes = {};  // of the arguments
};

// How a backend walks a Schedule in one launch, beside run_layered.
struct ResidentWalk {
  size_t (*fast_bytes)();  // of a block of the current device
  ResidentCode (*encode)(const Schedule& schedule, size_t fast_bytes);
  // steps: a copy of code.steps; arena: tasks x code.arena_bytes, 64-byte aligned. Both in the device's memory. args: [kArgs]
  void (*launch)(const ResidentCode& code, const void* steps, const View* args, void* arena, int64_t tasks, uintptr_t stream);
};

struct OpTable;
struct Program;

// The same backend's ops on tasks side by side, for Schedules of lane_schedule().
struct LaneOps {
  const OpTable* table;
  bool (*run)(const Program& net);                         // does it have all that the network needs?
  bool (*pays_off)(const Program& net, int64_t examples);  // are they faster, whatever the number of tasks and threads?
};

inline constexpr int kAnyLanes = 0;

struct OpTable {
  const char* backend = "";
  size_t real_bytes = 4;                   // 4: float, 8: double
  int lanes = 1;                           // tasks side by side in its Views; kAnyLanes: as many as one likes
  bool rectifies = false;                  // its linear, conv2d and group_norm heed layers.h's Rectified
  bool out_in = false;                     // its linear ops read weights as [out, in] (Linear::out_in), and in no other order
  const Device* device = nullptr;          // null: the host, where a task alone is the fast way; else all tasks at once
  OpFn run[kOps] = {};                     // null: this backend lacks the op
  ScratchFn scratch[kOps] = {};            // null: no scratch
  const ResidentWalk* resident = nullptr;  // null: this backend has none
  const LaneOps* in_lanes = nullptr;       // null: this backend has none
  // out[i] = sum_t w[t] x[t][i] (w null: the mean) by a fixed binary tree over t; x [T, size] is overwritten. `stride` from task to task:
  // on the host `size` may be a share of that, for threads to divide the work by; a device takes all at once.
  void (*tree_reduce)(void* out, void* x, const void* w, int64_t tasks, int64_t size, int64_t stride, uintptr_t stream) = nullptr;
  void (*tree_add)(void* a, const void* b, int64_t size) = nullptr;  // a += b, as at a node of that tree; on the host

  bool supports(Op op) const { return run[static_cast<int>(op)] != nullptr; }
};

const OpTable& reference_ops();             // float64, plain loops: the definition
const OpTable& cpu_ops(size_t real_bytes);  // the best instruction set of this machine, or set_cpu_isa's

// Runs body(0) .. body(n - 1), in any order, possibly at the same time. The caller owns the threads.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t)>& body)>;

// Scratch that outlives calls: one arena a worker, grown on first use and then kept.
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
  std::function<void(const Call&)> python_loss = {};  // a loss written in Python (op.h), for all tasks at once
  // Called by the worker that is about to walk the tasks first .. first + count - 1, which it does not where this is false: run_resident
  // only.
  std::function<bool(int64_t first, int64_t count)> before = {};
  std::deque<TreeSum>* sums = nullptr;  // of results that are summed over tasks, in the place of their `args`: run_resident only
  StepClock* clocks = nullptr;          // one a worker, to measure every Step
};

// Every Step once, over all tasks; the arena holds all tasks at once.
void run_layered(const Run& run, Arenas& arenas);
void run_layered(const Run& run, std::byte* arena);  // layered_bytes(run), 64-byte aligned, in the backend's memory
size_t layered_bytes(const Run& run);

// Every task (or group of `lanes` tasks) walks the whole list on one worker without leaving its arena. No loss written in Python.
void run_resident(const Run& run, Arenas& arenas, int workers, const ParallelFor& parallel_for);

// Between two ops of a loss written in Python as run_resident; there all tasks meet and the thread that called hands them to
// Run::python_loss.
// The arena holds all tasks at once.
void run_segments(const Run& run, Arenas& arenas, int workers, const ParallelFor& parallel_for);

}  // namespace fastmaml
