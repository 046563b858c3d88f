// One Schedule, every way to walk it: layered, resident and in segments, task-major and lane-interleaved, one thread and two, all with the
// same bits (reference) or within float64 rounding (cpu). And no allocation in a walk after the first.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>

#include "cpu/isa/choose_isa.h"
#include "networks.h"
#include "plan/fuse.h"

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
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }

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

enum class Walk { resident, layered, segments };

struct Way {
  const char* name;
  Walk walk;
  int lanes, workers;
};

// L = |z|^2 / 2: dz = z, dz_dot = z_dot. Counts how often all tasks came at once.
int caller_calls = 0;
void half_square(const Call& call) {
  ++caller_calls;
  const PythonLoss& shape = call.shape<PythonLoss>();
  const bool tangent = call.step.op == Op::caller_loss_jvp;
  for (int64_t t = 0; t < call.tasks; ++t) {
    const auto z = elements<double>(call[2], t), dz = elements<double>(call[tangent ? 0 : 1], t);  // [2] is z, or z_dot
    double sum = 0;
    for (int64_t i = 0; i < call.step.examples * shape.C * shape.H * shape.W; ++i) {
      sum += z[i] * z[i] / 2;
      dz[i] = z[i];
    }
    if (!tangent) elements<double>(call[0], t)[0] = sum;
  }
}

std::vector<double> results(const OpTable& table, const Schedule& schedule, int64_t tasks, const Way& way) {
  Arguments<double> arguments(schedule, tasks, 3);
  const Workspace workspace = plan_workspace(schedule, table);
  Arenas arenas;
  const Run run{table, schedule, workspace, arguments.views, tasks, way.lanes, 0, half_square};
  const ParallelFor parallel_for = way.workers > 1 ? ParallelFor(two_threads) : ParallelFor(one_thread);
  if (way.walk == Walk::resident) run_resident(run, arenas, way.workers, parallel_for);
  if (way.walk == Walk::segments) run_segments(run, arenas, way.workers, parallel_for);
  if (way.walk == Walk::layered) run_layered(run, arenas);
  std::vector<double> all;
  for (Arg arg : {Arg::loss, Arg::grad, Arg::output, Arg::support_losses, Arg::rate_grad, Arg::query_losses, Arg::step_rows_grad}) {
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

InnerLoopSpec spec_of(const std::string& loop, bool stash = false) {
  InnerLoopSpec spec;
  spec.loop = InnerLoop::parse(loop);
  spec.support_examples = spec.loop.minibatch ? spec.loop.minibatch * spec.loop.steps : 4;
  spec.query_examples = 5;
  spec.stash = stash;
  spec.loss_weights = spec.loop.queries.size() > 1;
  spec.mask = true;
  spec.uniform_rate = spec.loop.plain();
  return spec;
}

const Way kWays[] = {{"resident task-major", Walk::resident, 1, 1},
                     {"resident task-major, 2 threads", Walk::resident, 1, 2},
                     {"layered task-major", Walk::layered, 1, 1},
                     {"segments task-major, 2 threads", Walk::segments, 1, 2},
                     {"resident, 8 tasks in lanes", Walk::resident, 8, 1},
                     {"resident, 8 tasks in lanes, 2 threads", Walk::resident, 8, 2},
                     {"layered, 8 tasks in lanes", Walk::layered, 8, 1},
                     {"layered, 16 tasks in lanes", Walk::layered, 16, 1},
                     {"segments, 8 tasks in lanes, 2 threads", Walk::segments, 8, 2}};

// The first of `ways` on the reference is the definition; the ways without lanes also run on every instruction set.
void every_way(const Schedule& schedule, const std::string& label, const std::vector<Way>& ways) {
  const int64_t tasks = 11;
  const std::vector<double> definition = results(reference_ops(), schedule, tasks, ways[0]);
  for (const Way& way : ways) {
    const double error = worst(results(reference_ops(), schedule, tasks, way), definition);
    expect(error == 0, label + "reference, " + way.name, error);
  }
  for (const std::string& isa : available_cpu_isas()) {
    set_cpu_isa(isa);
    const std::vector<double> cpu = results(cpu_ops(8), schedule, tasks, ways[0]);
    expect(worst(cpu, definition) < 1e-10, label + "cpu " + isa + " against the reference", worst(cpu, definition));
    for (const Way& way : ways) {
      if (way.lanes > 1) continue;
      const double error = worst(results(cpu_ops(8), schedule, tasks, way), cpu);
      expect(error == 0, label + "cpu " + isa + ", " + way.name + ": same bits", error);
    }
  }
  set_cpu_isa("");
}

void networks_in_every_way(const char* network, const std::string& name) {
  const Program net = with_torch_weights(Program::parse(network));
  for (bool stash : {false, true})
    every_way(meta_gradient_schedule(net, spec_of("steps=3 rate_grad=1", stash)), name + (stash ? " stash: " : " low: "),
              {std::begin(kWays), std::end(kWays)});
}

void inner_loops_in_every_way() {
  const Program net = with_torch_weights(Program::parse(kConvnet));
  for (const char* loop : {"steps=3 momentum=0.9 nesterov=1 weight_decay=0.1 clip_norm=0.5 queries=1,2 rate_grad=1",
                           "steps=3 momentum=0.8 dampening=0.2 rows=2,3,6 queries=2 order=2 rate_grad=1",
                           "steps=3 rule=adam eps=1e-3 weight_decay=0.1 clip_value=0.1 minibatch=2 rate_grad=1",
                           "steps=3 rule=adam eps=1e-3 weight_decay=0.1 decoupled=1 proximal=1 order=0 rate_grad=1"})
    for (bool stash : {false, true})
      every_way(meta_gradient_schedule(net, spec_of(loop, stash)), std::string(loop) + (stash ? " stash: " : ": "),
                {kWays[0], kWays[1], kWays[4]});
}

void a_callers_loss_meets_all_tasks() {
  std::string text(kConvnet);
  text.replace(text.find("loss cross_entropy"), std::string::npos, "loss caller\n");
  const Program net = with_torch_weights(Program::parse(text));
  for (bool stash : {false, true}) {
    const Schedule schedule = meta_gradient_schedule(net, spec_of("steps=3 queries=1 momentum=0.5", stash));
    std::vector<Way> ways;
    for (const Way& way : kWays)
      if (way.walk != Walk::resident) ways.push_back(way);
    every_way(schedule, std::string("loss written in Python") + (stash ? " stash: " : " low: "), ways);
    caller_calls = 0;
    results(reference_ops(), schedule, 11, kWays[3]);
    const int passes = 3 + 2 + (stash ? 0 : 3) + 3;  // inner steps, queries, the sweep's gradients and tangents
    expect(caller_calls == passes, "one call a pass for all tasks", caller_calls);
  }
  try {
    results(reference_ops(), meta_gradient_schedule(net, spec_of("steps=1")), 3, kWays[0]);
    expect(false, "the resident walk refuses a loss written in Python");
  } catch (const std::invalid_argument&) {
    expect(true, "the resident walk refuses a loss written in Python");
  }
}

void lane_layout_is_refused_where_missing() {
  const Program net = with_torch_weights(Program::parse(kMlp));
  try {
    results(cpu_ops(8), gradient_schedule(net, 4, false), 3, {"", Walk::resident, 8, 1});
    expect(false, "cpu refuses the lane layout");
  } catch (const std::invalid_argument&) {
    expect(true, "cpu refuses the lane layout");
  }
}

void weights_in_the_wrong_order_are_refused() {
  for (const auto& [table, net] :
       {std::pair(&cpu_ops(8), Program::parse(kMlp)), std::pair(cpu_ops(8).in_lanes->table, with_torch_weights(Program::parse(kMlp)))})
    try {
      plan_workspace(gradient_schedule(net, 4, false), *table);
      expect(false, "weights in the wrong order are refused");
    } catch (const std::invalid_argument&) {
      expect(true, "weights in the wrong order are refused");
    }
}

void no_allocation_after_the_first_walk() {
  const Program net = with_torch_weights(Program::parse(kConvnet));
  const Schedule schedule = meta_gradient_schedule(net, spec_of("steps=2 rule=adam clip_norm=1"));
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
  const Program net = with_torch_weights(Program::parse(kConvnet));
  size_t first = 0;
  for (int K : {1, 5, 20}) {
    const Schedule schedule = meta_gradient_schedule(net, spec_of("steps=" + std::to_string(K)));
    const Workspace workspace = plan_workspace(schedule, cpu_ops(4));
    if (K == 1) first = workspace.task_bytes;
    const size_t phi = (size_t(net.param_count) * 4 + 63) / 64 * 64, growth = workspace.task_bytes - first;
    expect(growth <= size_t(K - 1) * phi, "arena growth at K = " + std::to_string(K) + " in units of phi", double(growth) / double(phi));
  }
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  networks_in_every_way(kMlp, "mlp");
  networks_in_every_way(kConvnet, "convnet");
  inner_loops_in_every_way();
  a_callers_loss_meets_all_tasks();
  lane_layout_is_refused_where_missing();
  weights_in_the_wrong_order_are_refused();
  no_allocation_after_the_first_walk();
  memory_grows_by_phi_alone();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
