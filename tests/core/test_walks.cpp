// One Schedule, every way to walk it: layered and resident, task-major and lane-interleaved, one thread and two, all with the same
// bits (reference) or within float64 rounding (cpu). And no allocation in a walk after the first.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>

#include "cpu/isa/choose_isa.h"
#include "networks.h"

static thread_local long allocations = 0;
void* operator new(size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes ? bytes : 1)) return p;
  throw std::bad_alloc();
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(bytes ? bytes : 1);
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace fastmaml {
namespace {

int passed = 0, failed = 0;

void expect(bool ok, const std::string& what, double value = 0) {
  ok ? ++passed : ++failed;
  std::printf("%s  %s  (%g)\n", ok ? "ok  " : "FAIL", what.c_str(), value);
}

void two_threads(int64_t n, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < n; ++i) pool.emplace_back([&body, i] { body(i); });
  body(0);
  for (std::thread& t : pool) t.join();
}
void one_thread(int64_t n, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < n; ++i) body(i);
}

struct Way {
  const char* name;
  bool resident;
  int lanes, workers;
};

std::vector<double> results(const OpTable& table, const Schedule& schedule, int64_t tasks, const Way& way) {
  Arguments<double> arguments(schedule, tasks, 3);
  const Workspace workspace = plan_workspace(schedule, table);
  Arenas arenas;
  const Run run{table, schedule, workspace, arguments.views, tasks, way.lanes};
  if (way.resident)
    run_resident(run, arenas, way.workers, way.workers > 1 ? ParallelFor(two_threads) : ParallelFor(one_thread));
  else
    run_layered(run, arenas);
  std::vector<double> all;
  for (Arg arg : {Arg::loss, Arg::grad, Arg::output, Arg::support_losses, Arg::rate_grad}) {
    const auto& part = arguments.real[static_cast<int>(arg)];
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

double worst(const std::vector<double>& a, const std::vector<double>& b) {
  double w = a.size() == b.size() ? 0 : INFINITY, scale = 0;
  for (double v : b) scale = std::max(scale, std::fabs(v));
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) w = std::max(w, std::isnan(a[i]) ? INFINITY : std::fabs(a[i] - b[i]) / scale);
  return w;
}

void every_way(const char* network, const char* name) {
  const Program net = Program::parse(network);
  for (bool stash : {false, true}) {
    Adaptation how;
    how.support_examples = 4;
    how.query_examples = 5;
    how.inner_steps = 3;
    how.stash = stash;
    how.rate_grad = true;
    const Schedule schedule = meta_gradient_schedule(net, how);
    const int64_t tasks = 11;
    const Way ways[] = {{"resident task-major", true, 1, 1},
                        {"resident task-major, 2 threads", true, 1, 2},
                        {"layered task-major", false, 1, 1},
                        {"resident, 8 tasks in lanes", true, 8, 1},
                        {"resident, 8 tasks in lanes, 2 threads", true, 8, 2},
                        {"layered, 8 tasks in lanes", false, 8, 1},
                        {"layered, 16 tasks in lanes", false, 16, 1}};
    const std::vector<double> definition = results(reference_ops(), schedule, tasks, ways[0]);
    const std::string label = std::string(name) + (stash ? " stash: " : " low: ");
    for (const Way& way : ways) {
      const double error = worst(results(reference_ops(), schedule, tasks, way), definition);
      expect(error == 0, label + "reference, " + way.name, error);
    }
    for (const std::string& isa : available_cpu_isas()) {
      set_cpu_isa(isa);
      const std::vector<double> cpu = results(cpu_ops(8), schedule, tasks, ways[0]);
      expect(worst(cpu, definition) < 1e-10, label + "cpu " + isa + " against the reference", worst(cpu, definition));
      for (const Way& way : {ways[1], ways[2]}) {
        const double error = worst(results(cpu_ops(8), schedule, tasks, way), cpu);
        expect(error == 0, label + "cpu " + isa + ", " + way.name + ": same bits", error);
      }
    }
    set_cpu_isa("");
  }
}

void lane_layout_is_refused_where_missing() {
  const Program net = Program::parse(kMlp);
  try {
    results(cpu_ops(8), gradient_schedule(net, 4, false), 3, {"", true, 8, 1});
    expect(false, "cpu refuses the lane layout");
  } catch (const std::invalid_argument&) {
    expect(true, "cpu refuses the lane layout");
  }
}

void no_allocation_after_the_first_walk() {
  const Program net = Program::parse(kConvnet);
  Adaptation how;
  how.support_examples = 4;
  how.query_examples = 5;
  how.inner_steps = 2;
  const Schedule schedule = meta_gradient_schedule(net, how);
  Arguments<float> arguments(schedule, 3, 3);
  const OpTable& table = cpu_ops(4);
  const Workspace workspace = plan_workspace(schedule, table);
  Arenas arenas;
  const Run run{table, schedule, workspace, arguments.views, 3};
  const ParallelFor inline_for = one_thread;
  run_resident(run, arenas, 1, inline_for);
  const long before = allocations, arenas_before = arenas.allocations();
  run_resident(run, arenas, 1, inline_for);
  const long made = allocations - before + arenas.allocations() - arenas_before;
  expect(made == 0, "no allocation after the first walk", double(made));
}

// In low memory the arena grows by one phi per inner step and by nothing else.
void memory_grows_by_phi_alone() {
  const Program net = Program::parse(kConvnet);
  size_t first = 0;
  for (int K : {1, 5, 20}) {
    Adaptation how;
    how.support_examples = 4;
    how.query_examples = 5;
    how.inner_steps = K;
    const Workspace workspace = plan_workspace(meta_gradient_schedule(net, how), cpu_ops(4));
    if (K == 1) first = workspace.task_bytes;
    const size_t phi = (size_t(net.param_count) * 4 + 63) / 64 * 64, growth = workspace.task_bytes - first;
    expect(growth <= size_t(K - 1) * phi, "arena growth at K = " + std::to_string(K) + " in units of phi", double(growth) / double(phi));
  }
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  every_way(kMlp, "mlp");
  every_way(kConvnet, "convnet");
  lane_layout_is_refused_where_missing();
  no_allocation_after_the_first_walk();
  memory_grows_by_phi_alone();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
