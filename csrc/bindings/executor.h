// Where a call's arrays live and its Steps run.
// On the host: its memory and torch's threads. On a device: torch's allocator and stream.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <memory>
#include <vector>

#include "plan/plan.h"

namespace fastmaml {

using torch::stable::Tensor;

class Executor {
 public:
  using Type = torch::headeronly::ScalarType;
  using Params = std::vector<Param>;
  using PythonLossFn = std::function<void(const Call&)>;

  virtual ~Executor() = default;

  virtual void* take(size_t bytes) = 0;  // 64-byte aligned; lives as long as this object
  virtual Tensor empty(const std::vector<int64_t>& sizes, Type type) = 0;
  virtual void copy(void* to, const void* from, size_t bytes) = 0;
  virtual void numbers(void* to, const double* values, size_t count, size_t real_bytes) = 0;
  // Moves `count` vectors from torch's order to the engine's, or back. `to` and `from` must not overlap.
  virtual void reorder(const Params& params, bool from_torch, void* to, const void* from, int64_t count, size_t real_bytes) = 0;
  // Moves `count` vectors of each task from torch's order, before run() reads them. params, to and from must last until then.
  virtual void reorder_tasks(const Params& params, void* to, const void* from, int64_t tasks, int64_t count, size_t real_bytes) {
    reorder(params, true, to, from, tasks * count, real_bytes);
  }
  // Host only. run() throws std::invalid_argument with this name if one of a task's `count` numbers is not finite.
  virtual void expect_finite(const char* /* name */, const void* /* x */, int64_t /* count */, size_t /* real_bytes */) {}
  // run() sums this result [size] over the tasks into `out`, by OpTable::tree_reduce. w [tasks] and out must last until then.
  void sum(Arg arg, void* out, const void* w, int64_t size) { sums_.push_back({arg, out, w, size}); }
  // args: inputs, and places for results that are not summed. run() may put a result elsewhere; it then changes the View in `args`.
  virtual void run(const std::shared_ptr<const Plan>& plan, View* args, int64_t tasks, const PythonLossFn& loss) = 0;

 protected:
  struct Sum {
    Arg arg;
    void* out;
    const void* w;
    int64_t size;
  };
  std::vector<Sum> sums_;
  // Gives every task a place for its own numbers, for a run that sums them at its end.
  void place_sums(View* args, int64_t tasks, size_t real_bytes) {
    for (const Sum& sum : sums_) args[static_cast<int>(sum.arg)] = {take(size_t(tasks * sum.size) * real_bytes), sum.size, 1};
  }
};

std::unique_ptr<Executor> host_executor();
std::unique_ptr<Executor> device_executor(const OpTable& table, const Tensor& like);  // for tensors on the same device as `like`

// ---------------------------------------------------------------- devices: recordings of whole calls (device_executor.cpp)

// A call with a known network, sizes and number of tasks is recorded, and replayed from then on.
// A replay copies the inputs to the recording's places and is one launch. Off: every call launches every Step.
void set_recording(bool on);
struct RecordingCounts {
  int64_t held = 0, replays = 0;  // replays: since the process began
};
RecordingCounts recording_counts();
void forget_recordings();

}  // namespace fastmaml
