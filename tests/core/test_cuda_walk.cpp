// Whole Schedules on the emulated CUDA table: meta-gradients and conjugate gradients as the reference computes them, with the same bits in
// every order of threads and whatever the batch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "cuda/cuda_tables.h"
#include "cuda/emulated/emu.h"
#include "networks.h"
#include "plan/fuse.h"
#include "task_results.h"

namespace fastmaml {
namespace {

int passed = 0, failed = 0;

void report(bool ok, const std::string& what, double value) {
  ok ? ++passed : ++failed;
  std::printf("%s  %s  (%.1e)\n", ok ? "ok  " : "FAIL", what.c_str(), value);
}

// What kConvnet of networks.h lacks: strides, group and layer norm, average pooling, smooth and leaky functions.
const char* const kNormnet = R"(fastmaml 1
input 3 8 7
param 0 4 3 3 3
param 108 4
param 112 4
param 116 4
param 120 36
param 156 36
param 192 2 36
param 264 2
conv2d 0 weight=0 bias=1 stride=2,2 padding=1,1
group_norm 1 weight=2 bias=3 groups=2 eps=1e-5
gelu_tanh 2
avg_pool2d 3 kernel=2,2 stride=1,1 padding=0,0 count_include_pad=1
flatten 4
layer_norm 5 weight=4 bias=5 dims=1 eps=1e-5
leaky_relu 6 slope=0.1
linear 7 weight=6 bias=7
output 8
loss mse
)";

// What fuse() joins: pools side by side and overlapping, none, a norm on the bare input (without tangent and gradient).
const char* const kFusednet = R"(fastmaml 1
input 2 9 8
param 0 2
param 2 2
param 4 5 2 3 3
param 94 5
param 99 5
param 104 4 5 3 3
param 284 4
param 288 4
param 292 3 16
batch_norm 0 weight=0 bias=1 eps=1e-3 mode=batch
leaky_relu 1 slope=0.2
conv2d 2 weight=2 bias=-1 stride=1,1 padding=1,1
batch_norm 3 weight=3 bias=4 eps=1e-3 mode=batch
relu 4
max_pool2d 5 kernel=2,2 stride=2,2 padding=0,0
conv2d 6 weight=5 bias=-1 stride=1,1 padding=1,1
batch_norm 7 weight=6 bias=7 eps=1e-3 mode=batch
relu 8
max_pool2d 9 kernel=3,3 stride=2,2 padding=1,1
flatten 10
linear 11 weight=8 bias=-1
output 12
loss cross_entropy smoothing=0
)";

constexpr int64_t kTasks = 3;

// What a walk over the tasks first .. first + tasks - 1 writes.
template <class T>
Results results(const OpTable& table, const Schedule& schedule, int64_t first = 0, int64_t tasks = kTasks) {
  Arguments<T> arguments(schedule, kTasks, 3);
  const Workspace workspace = plan_workspace(schedule, table);
  View views[kArgs];
  for (int a = 0; a < kArgs; ++a) {
    views[a] = arguments.views[a];
    const size_t bytes = arguments.label[a].empty() ? sizeof(T) : sizeof(int64_t);
    if (views[a]) views[a].data = static_cast<std::byte*>(views[a].data) + size_t(first * views[a].task_stride) * bytes;
  }
  Arenas arenas;
  run_layered({table, schedule, workspace, views, tasks}, arenas);
  Results out;
  for (int a = static_cast<int>(Arg::loss); a < kArgs; ++a) {
    const std::vector<T>& all = arguments.real[a];
    const auto size = std::ptrdiff_t(all.size()) / kTasks;
    out.emplace_back(all.begin() + first * size, all.begin() + (first + tasks) * size);
  }
  return out;
}

// The worst entry, relative to the largest of the result it is in.
double worst(const Results& got, const Results& want) {
  double w = 0;
  for (size_t a = 0; a < want.size(); ++a) {
    double scale = 0;
    for (double v : want[a]) scale = std::max(scale, std::fabs(v));
    for (size_t i = 0; i < want[a].size(); ++i) {
      const double error = std::fabs(got[a][i] - want[a][i]) / scale;
      w = std::isnan(error) ? INFINITY : std::max(w, error);
    }
  }
  return w;
}

bool supported(Op op) { return cuda_emulated_ops(sizeof(float)).supports(op); }

template <class T>
void check(const std::string& name, const Schedule& schedule, const Results& definition, double tolerance) {
  try {
    const OpTable& table = cuda_emulated_ops(sizeof(T));
    const std::string label = name + (sizeof(T) == 4 ? " float32" : " float64");
    const Results got = results<T>(table, schedule);
    report(worst(got, definition) <= tolerance, label + " against the reference", worst(got, definition));
    if (emu::watched()) return;  // the same accesses again, whose bits the build that is not watched compares
    emu::set_order(emu::Order::random, 3);
    report(results<T>(table, schedule) == got, label + ": the same bits in another order of threads", 0);
    emu::set_order(emu::Order::ascending);
    report(last_task_is(got, results<T>(table, schedule, kTasks - 1, 1)), label + ": the last task alone has the same bits", 0);
  } catch (const std::exception& e) {
    report(false, name + ": " + e.what(), 0);
  }
}

void check_both(const std::string& name, const Schedule& parts) {
  const Schedule schedule = fuse(parts, supported);
  const Results definition = results<double>(reference_ops(), schedule);
  check<double>(name, schedule, definition, 1e-12);  // sums in another order
  check<float>(name, schedule, definition, 1e-5);    // float32 through two inner steps, where no mask flips
}

void network(const std::string& name, const std::string& text) {
  const Program net = fuse(Program::parse(text), {supported, true});
  InnerLoopSpec spec;
  spec.support_examples = 5;
  spec.query_examples = 3;
  spec.loop = InnerLoop::parse("steps=2 rate_grad=1");
  check_both(name + " low memory", meta_gradient_schedule(net, spec));
  spec.stash = true;
  spec.rates_per_step = true;
  spec.support_weights = true;
  check_both(name + " stash", meta_gradient_schedule(net, spec));
  spec.loop = InnerLoop::parse("steps=2 order=0 rate_grad=1");
  check_both(name + " first order", meta_gradient_schedule(net, spec));
  if (net.uses_support_stats()) return;
  for (const bool masked : {false, true}) check_both(name + " conjugate gradients", conjugate_gradient_schedule(net, 5, false, masked, 3));
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  emu::set_order(emu::Order::ascending);
  network("mlp", kMlp);
  network("convnet", kConvnet);
  network("fusednet", kFusednet);
  network("rectified mlp", kRectifiedMlp);
  network("rectified net", kRectified);
  for (const auto& [name, text] : {std::pair{"convnet", kConvnet}, {"fusednet", kFusednet}}) {
    std::string support = text;
    for (size_t at; (at = support.find("mode=batch")) != std::string::npos;) support.replace(at, 10, "mode=support");
    network(name + std::string(" in support mode"), support);
  }
  network("normnet", kNormnet);
  std::printf("%d passed, %d failed, %ld launches\n", passed, failed, long(emu::launches()));
  return failed != 0;
}
