#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <stdexcept>

#include "bindings/executor.h"
#include "program/param_layout.h"

namespace fastmaml {
namespace {

namespace stable = torch::stable;
using torch::headeronly::ScalarType;

constexpr size_t kAlign = 64;
size_t round_up(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

std::byte* bytes_of(const Tensor& x) { return static_cast<std::byte*>(const_cast<void*>(x.const_data_ptr())); }

Tensor bytes_on(const stable::Device& device, size_t bytes) {
  return stable::empty({int64_t(std::max<size_t>(bytes, kAlign))}, ScalarType::Byte, std::nullopt, device);
}

// ---------------------------------------------------------------- where torch is

// The function is in torch's CUDA library, which a CPU build of torch lacks. So it is looked up at run time.
uintptr_t current_cuda_stream(int device) {
  using Function = int (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (!function || function(device, &stream) != 0) throw std::runtime_error("torch cannot name its current CUDA stream");
  return reinterpret_cast<uintptr_t>(stream);
}

class CurrentDevice {
 public:
  CurrentDevice(const Device& device, int index) : device_(device), before_(device.use(index)) {}
  ~CurrentDevice() {
    try {
      device_.use(before_);
    } catch (const std::exception&) {  // the device is lost; the call itself has reported this
    }
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  const Device& device_;
  const int before_;
};

// ---------------------------------------------------------------- orders of parameters

// For each number of one order, its index in the other. On the device, made once for each list of parameters.
Tensor reorder_index(const Executor::Params& params, bool from_torch, const stable::Device& device) {
  static std::mutex mutex;
  static auto* known = new std::map<std::string, Tensor>;  // never destroyed: calls may still run while the process ends
  std::string key = std::to_string(int(device.type())) + " " + std::to_string(device.index()) + (from_torch ? "<" : ">");
  for (const Param& p : params) {
    key += ' ' + std::to_string(p.offset) + char('0' + int(p.order));
    for (int64_t dim : p.dims) key += ',' + std::to_string(dim);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known->find(key);
  if (found != known->end()) return found->second;
  const int64_t size = size_of(params);
  if (size > INT32_MAX) throw std::invalid_argument("a network on a device has at most 2^31 parameters");
  std::vector<int32_t> places(size);
  std::iota(places.begin(), places.end(), 0);
  const Tensor index = stable::empty({size}, ScalarType::Int);
  int32_t* to = static_cast<int32_t*>(index.mutable_data_ptr());
  from_torch ? params_from_torch(params, to, places.data(), 1) : params_to_torch(params, to, places.data(), 1);
  if (known->size() >= 64) known->clear();
  return known->emplace(key, stable::to(index, device)).first->second;
}

// ---------------------------------------------------------------- Steps for a kernel that reads them

// A plan's encoded Steps in the device's memory, copied there once.
const void* resident_steps(const std::shared_ptr<const Plan>& plan, const stable::Device& device) {
  if (device.type() == stable::DeviceType::CPU) return plan->resident.steps.data();  // the emulator's device memory is the host's
  struct Copy {
    std::shared_ptr<const Plan> plan;
    stable::Device device;
    Tensor steps;
  };
  static std::mutex mutex;
  static auto* known = new std::list<Copy>;  // most recently used first; never destroyed: calls may still run while the process ends
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = known->begin(); it != known->end(); ++it)
    if (it->plan == plan && it->device == device) {
      known->splice(known->begin(), *known, it);
      return bytes_of(known->front().steps);
    }
  const std::vector<std::byte>& steps = plan->resident.steps;
  const Tensor here = stable::empty({int64_t(steps.size())}, ScalarType::Byte);
  std::memcpy(here.mutable_data_ptr(), steps.data(), steps.size());
  known->push_front({plan, device, stable::to(here, device)});
  if (known->size() > 64) known->pop_back();
  return bytes_of(known->front().steps);
}

// ---------------------------------------------------------------- recordings

constexpr size_t kMostRecordings = 16;
// A call with more memory than this runs so long that its launches cost next to nothing.
constexpr size_t kMostBytes = size_t(1) << 30;

struct Recorded {
  std::shared_ptr<const Plan> plan;
  int64_t tasks;
  std::array<bool, kArgs> shared;
  int device;
  uintptr_t stream;

  std::mutex in_use;  // held from copying the inputs until the results are being copied out
  const Device* functions = nullptr;
  void* recording = nullptr;  // null: the call was seen only once
  Tensor memory;
  std::array<View, kArgs> args;
  std::array<size_t, kArgs> bytes;

  bool is(const std::shared_ptr<const Plan>& p, int64_t t, const std::array<bool, kArgs>& s, int d, uintptr_t on) const {
    return plan == p && tasks == t && shared == s && device == d && stream == on;
  }
  ~Recorded() {
    if (recording) functions->forget(recording);
  }
};

std::mutex recordings_mutex;
bool recording_on = true;
int64_t replays = 0;
std::list<std::shared_ptr<Recorded>>& recordings() {  // most recently used first
  static auto* all = new std::list<std::shared_ptr<Recorded>>;
  return *all;
}

// Bytes of one argument; a shared argument counts once.
size_t bytes_of_arg(const Slot& slot, const View& view, int64_t tasks, size_t real_bytes) {
  return size_t(slot.size) * (view.task_stride ? size_t(tasks) : 1) * element_bytes(slot.type, real_bytes);
}

bool is_result(int arg) { return arg >= static_cast<int>(Arg::loss); }

// ---------------------------------------------------------------- the executor

class DeviceExecutor : public Executor {
 public:
  DeviceExecutor(const OpTable& table, const Tensor& like)
      : device_(*table.device),
        place_(like.device()),
        current_(device_, std::max(0, int(place_.index()))),
        stream_(like.is_cuda() ? current_cuda_stream(place_.index()) : 0) {}

  void* take(size_t bytes) override {
    taken_.push_back(bytes_on(place_, bytes));
    return bytes_of(taken_.back());
  }

  Tensor empty(const std::vector<int64_t>& sizes, Type type) override { return stable::empty(sizes, type, std::nullopt, place_); }

  void copy(void* to, const void* from, size_t bytes) override {
    if (!bytes) return;
    const Device::Piece piece{to, from, bytes};
    device_.copy(&piece, 1, stream_);
  }

  // The values travel in the launches. A copy from host memory would need that memory to outlive the call.
  void numbers(void* to, const double* values, size_t count, size_t real_bytes) override {
    Tensor x = empty({int64_t(count)}, real_bytes == sizeof(float) ? ScalarType::Float : ScalarType::Double);
    for (size_t i = 0; i < count; ++i) {
      Tensor one = stable::narrow(x, 0, int64_t(i), 1);
      stable::fill_(one, values[i]);
    }
    taken_.push_back(x);
    copy(to, bytes_of(x), count * real_bytes);
  }

  void reorder(const Params& params, bool from_torch, void* to, const void* from, int64_t count, size_t) override {
    const Tensor index = reorder_index(params, from_torch, place_);
    device_.gather(to, from, static_cast<const int32_t*>(index.const_data_ptr()), count, size_of(params), stream_);
  }

  void run(const std::shared_ptr<const Plan>& plan, View* args, int64_t tasks, const PythonLossFn& loss) override {
    place_sums(args, tasks, plan->table->real_bytes);
    walk(plan, args, tasks, loss);
    for (const Sum& sum : sums_)
      plan->table->tree_reduce(sum.out, args[static_cast<int>(sum.arg)].data, sum.w, tasks, sum.size, sum.size, stream_);
    sums_.clear();
  }

 private:
  const Device& device_;
  const stable::Device place_;
  const CurrentDevice current_;
  const uintptr_t stream_;
  std::vector<Tensor> taken_;
  std::shared_ptr<Recorded> replayed_;
  std::unique_lock<std::mutex> replaying_;  // destroyed before replayed_, which owns the mutex

  void walk(const std::shared_ptr<const Plan>& plan, View* args, int64_t tasks, const PythonLossFn& loss) {
    Run run{*plan->table, plan->schedule, plan->workspace, args, tasks, 1, stream_};
    if (plan->takes_resident()) {
      const ResidentCode& code = plan->resident;
      void* const arena = take(size_t(tasks) * code.arena_bytes);
      plan->table->resident->launch(code, resident_steps(plan, place_), args, arena, tasks, stream_);
      return;
    }
    const bool in_python = plan->program->loss.kind == Loss::Kind::caller;
    if (in_python) run.python_loss = loss;
    if (!in_python && replayed(plan, run, args)) return;
    run_layered(run, static_cast<std::byte*>(take(layered_bytes(run))));
  }

  // The recording of this call, if the call was made often enough to have one.
  std::shared_ptr<Recorded> recorded(const std::shared_ptr<const Plan>& plan, int64_t tasks, const View* args) {
    std::array<bool, kArgs> shared{};
    for (int a = 0; a < kArgs; ++a) shared[a] = args[a] && args[a].task_stride == 0;
    const std::lock_guard<std::mutex> lock(recordings_mutex);
    if (!recording_on) return nullptr;
    auto& all = recordings();
    for (auto it = all.begin(); it != all.end(); ++it)
      if ((*it)->is(plan, tasks, shared, place_.index(), stream_)) {
        all.splice(all.begin(), all, it);
        return all.front();
      }
    auto fresh = std::make_shared<Recorded>();
    fresh->plan = plan;
    fresh->tasks = tasks;
    fresh->shared = shared;
    fresh->device = place_.index();
    fresh->stream = stream_;
    all.push_front(std::move(fresh));
    if (all.size() > kMostRecordings) all.pop_back();
    return nullptr;
  }

  bool replayed(const std::shared_ptr<const Plan>& plan, const Run& run, View* args) {
    if (device_.is_recorded(stream_)) return false;
    replayed_ = recorded(plan, run.tasks, args);
    if (!replayed_) return false;
    Recorded& it = *replayed_;
    replaying_ = std::unique_lock<std::mutex>(it.in_use);
    if (!it.recording && !record(it, run)) {
      replaying_ = {};
      return false;
    }
    std::vector<Device::Piece> inputs;
    for (int a = 0; a < kArgs; ++a)
      if (it.bytes[a] && !is_result(a)) inputs.push_back({it.args[a].data, args[a].data, it.bytes[a]});
    device_.copy(inputs.data(), int(inputs.size()), stream_);
    device_.replay(it.recording, stream_);
    for (int a = 0; a < kArgs; ++a)
      if (it.bytes[a] && is_result(a)) args[a] = it.args[a];
    const std::lock_guard<std::mutex> lock(recordings_mutex);
    ++replays;
    return true;
  }

  // Gives every argument a fixed place, and records one walk of the Steps without running them.
  bool record(Recorded& it, const Run& run) {
    size_t total = 0;
    it.args = {};
    it.bytes = {};
    std::array<size_t, kArgs> at{};
    for (const Slot& slot : run.schedule.slots) {
      const int a = static_cast<int>(slot.arg);
      if (slot.arg == Arg::none || !run.args[a]) continue;
      it.bytes[a] = bytes_of_arg(slot, run.args[a], run.tasks, run.table.real_bytes);
      at[a] = total;
      total += round_up(it.bytes[a]);
    }
    const size_t arena = total;
    total += layered_bytes(run);
    if (total > kMostBytes) return false;
    it.memory = bytes_on(place_, total);
    std::byte* const memory = bytes_of(it.memory);
    for (int a = 0; a < kArgs; ++a)
      if (it.bytes[a]) it.args[a] = {memory + at[a], run.args[a].task_stride, 1};
    it.functions = &device_;
    Run recorded = run;
    recorded.args = it.args.data();
    recorded.stream = device_.begin_recording();
    try {
      run_layered(recorded, memory + arena);
    } catch (...) {
      try {
        if (void* part = device_.end_recording()) device_.forget(part);
      } catch (const std::exception&) {  // the walk's own error is the one to report
      }
      throw;
    }
    it.recording = device_.end_recording();
    return true;
  }
};

}  // namespace

std::unique_ptr<Executor> device_executor(const OpTable& table, const Tensor& like) {
  return std::make_unique<DeviceExecutor>(table, like);
}

void set_recording(bool on) {
  const std::lock_guard<std::mutex> lock(recordings_mutex);
  recording_on = on;
  if (!on) recordings().clear();
}

RecordingCounts recording_counts() {
  const std::lock_guard<std::mutex> lock(recordings_mutex);
  RecordingCounts counts{0, replays};
  for (const auto& it : recordings()) counts.held += it->recording != nullptr;
  return counts;
}

void forget_recordings() {
  const std::lock_guard<std::mutex> lock(recordings_mutex);
  recordings().clear();
}

}  // namespace fastmaml
