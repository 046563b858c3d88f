#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "bindings/profile.h"
#include "bindings/space.h"
#include "bindings/threads.h"
#include "program/param_layout.h"

namespace fastmaml {
namespace {

template <class T>
void reorder_as(const Space::Params& params, bool from_torch, void* to, const void* from, int64_t count) {
  const int64_t size = size_of(params);
  in_parallel(count, [&](int64_t i) {
    T* target = static_cast<T*>(to) + i * size;
    const T* source = static_cast<const T*>(from) + i * size;
    if (from_torch)
      params_from_torch(params, target, source, 1);
    else
      params_to_torch(params, target, source, 1);
  });
}

// Memory outlives the call in a Workplace: after the first call nothing is allocated.
class HostSpace : public Space {
 public:
  void* take(size_t bytes) override { return place_->take(bytes); }

  Tensor empty(const std::vector<int64_t>& sizes, Type type) override { return torch::stable::empty(sizes, type); }

  void copy(void* to, const void* from, size_t bytes) override {
    if (bytes) std::memcpy(to, from, bytes);
  }

  void numbers(void* to, const double* values, size_t count, size_t real_bytes) override {
    if (real_bytes == sizeof(float))
      std::copy(values, values + count, static_cast<float*>(to));
    else
      std::copy(values, values + count, static_cast<double*>(to));
  }

  void reorder(const Params& params, bool from_torch, void* to, const void* from, int64_t count, size_t real_bytes) override {
    if (real_bytes == sizeof(float))
      reorder_as<float>(params, from_torch, to, from, count);
    else
      reorder_as<double>(params, from_torch, to, from, count);
  }

  void run(const std::shared_ptr<const Plan>& plan, View* args, int64_t tasks, const CallersLoss& loss) override {
    Run run{*plan->table, plan->schedule, plan->workspace, args, tasks};
    const int workers = static_cast<int>(std::min<int64_t>(tasks, thread_count()));
    WalkClocks clocks(plan, workers, tasks);
    run.clocks = clocks.get();
    if (plan->program->loss.kind == Loss::Kind::caller) {
      run.caller = loss;
      run_segments(run, place_->arenas, workers, in_parallel);
    } else {
      run_resident(run, place_->arenas, workers, in_parallel);
    }
  }

 private:
  LentWorkplace place_;
};

}  // namespace

std::unique_ptr<Space> host_space() { return std::make_unique<HostSpace>(); }

std::unique_ptr<Space> space_for(const OpTable& table, const char* name, const Tensor& like) {
  const bool on_cuda = std::string(table.backend) == "cuda";
  if (on_cuda != like.is_cuda() || (!on_cuda && !like.is_cpu()))
    throw std::invalid_argument(std::string(name) + " must be on " + (on_cuda ? "a CUDA device" : "the CPU") + " for backend " +
                                table.backend);
  return table.device ? device_space(table, like) : host_space();
}

}  // namespace fastmaml
