// The cpu backend's ops on tasks side by side, a task in each lane: every one of them against the reference, in whole Schedules, for full
// and partly filled groups; and a task's bits do not depend on the others.
#include <cmath>
#include <cstdio>
#include <set>
#include <thread>

#include "cpu/isa/choose_isa.h"
#include "networks.h"
#include "plan/fuse.h"
#include "plan/lane_schedule.h"

namespace fastmaml {
namespace {

int passed = 0, failed = 0;

void expect(bool ok, const std::string& what, double value) {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAIL  %s  (%g)\n", what.c_str(), value);
}

// Images, both norms, an addition, a tied weight, a classifier: all layers that have lanes.
const char* const kDense = R"(fastmaml 1
input 2 3 2
param 0 7 12
param 84 7
param 91 7
param 98 7
param 105 7 7
param 154 7
param 161 3 7
param 182 3
flatten 0
linear 1 weight=0 bias=1
layer_norm 2 weight=2 bias=3 dims=1 eps=1e-3
gelu 3
linear 4 weight=4 bias=5
silu 5
linear 6 weight=4 bias=5
sigmoid 7
add 8,4
gelu_tanh 9
linear 10 weight=6 bias=7
output 11
loss cross_entropy smoothing=0.1
)";

const char* const kRectifiedNorm = R"(fastmaml 1
input 6
param 0 11 6
param 66 11
param 77 11
param 88 11
param 99 4 11
param 143 4
param 147 4 4
linear 0 weight=0 bias=1
group_norm 1 weight=2 bias=3 groups=1 eps=1e-3
relu 2
linear 3 weight=4 bias=5
leaky_relu 4 slope=0.2
linear 5 weight=6 bias=-1
tanh 6
leaky_relu 7 slope=-0.1
output 8
loss mse
)";

struct Case {
  std::string name;
  const char* network;
  std::function<Schedule(const Program&)> schedule;
};

InnerLoopSpec spec_of(const std::string& loop, bool stash, bool weights) {
  InnerLoopSpec spec;
  spec.loop = InnerLoop::parse(loop);
  spec.support_examples = spec.loop.minibatch ? spec.loop.minibatch * spec.loop.steps : 5;
  spec.query_examples = 37;  // more than one block of rows
  spec.stash = stash;
  spec.loss_weights = spec.loop.queries.size() > 1;
  spec.mask = true;
  spec.uniform_rate = spec.loop.plain();
  spec.support_weights = spec.query_weights = weights;
  return spec;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const auto& [name, network] : {std::pair{"mlp", kMlp}, {"rectified", kRectifiedMlp}, {"dense", kDense}, {"norm", kRectifiedNorm}}) {
    const auto add = [&](const std::string& what, const auto& schedule) {
      all.push_back({std::string(name) + " " + what, network, schedule});
    };
    add("forward", [](const Program& net) { return forward_schedule(net, 6, 0); });
    add("gradient", [](const Program& net) { return gradient_schedule(net, 6, true); });
    add("vjp", [](const Program& net) { return vjp_schedule(net, 6); });
    add("hvp", [](const Program& net) { return hvp_schedule(net, 40, false); });
    for (const bool masked : {false, true})
      add("solve", [masked](const Program& net) { return conjugate_gradient_schedule(net, 6, false, masked, 3); });
    for (const bool dual : {false, true}) add("passes", [dual](const Program& net) { return passes_schedule(net, 6, dual); });
    add("adapt", [](const Program& net) { return adapt_schedule(net, spec_of("steps=3 rule=adam eps=1e-3", false, false)); });
    for (const bool stash : {false, true})
      for (const char* loop : {"steps=2", "steps=0", "steps=3 rate_grad=1", "steps=2 order=0 rate_grad=1",
                               "steps=3 momentum=0.8 dampening=0.2 rows=1 queries=2 order=2 rate_grad=1",
                               "steps=3 momentum=0.9 nesterov=1 weight_decay=0.1 clip_norm=0.05 queries=1,2 rate_grad=1",
                               "steps=3 rule=adam eps=1e-3 weight_decay=0.1 clip_value=0.01 minibatch=2 rate_grad=1",
                               "steps=3 rule=adam eps=1e-3 weight_decay=0.1 decoupled=1 proximal=1 order=1 rate_grad=1"})
        add(std::string("meta-gradient ") + loop + (stash ? " stash" : ""),
            [=](const Program& net) { return meta_gradient_schedule(net, spec_of(loop, stash, stash)); });
  }
  return all;
}

void one_thread(int64_t n, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < n; ++i) body(i);
}
void two_threads(int64_t n, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < n; ++i) pool.emplace_back([&body, i] { body(i); });
  body(0);
  for (std::thread& t : pool) t.join();
}

// results[task]: everything that the task gets
using Results = std::vector<std::vector<double>>;

template <class T>
Results results(const OpTable& table, const Case& c, int64_t tasks, int workers = 1, bool layered = false, std::set<Op>* ops = nullptr) {
  const auto supports = [&](Op op) { return table.supports(op); };
  const Program net = fuse(Program::parse(c.network), {supports, table.rectifies});
  Schedule schedule = fuse(c.schedule(net), supports);
  if (table.lanes > 1) schedule = lane_schedule(std::move(schedule));
  if (ops)
    for (const Step& step : schedule.steps) ops->insert(step.op);
  Arguments<T> arguments(schedule, tasks, 3);
  // conjugate gradients need a positive definite matrix: a large lam, and no more damping than one
  if (View& settings = arguments.views[int(Arg::cg_settings)]) {
    static T numbers[3] = {T(50), T(0.5), T(1e-10)};
    settings = {numbers, 0, 1};
  }
  const Workspace workspace = plan_workspace(schedule, table);
  Arenas arenas;
  const Run run{table, schedule, workspace, arguments.views, tasks, std::max(table.lanes, 1)};
  if (layered)
    run_layered(run, arenas);
  else
    run_resident(run, arenas, workers, workers > 1 ? ParallelFor(two_threads) : ParallelFor(one_thread));
  Results all(static_cast<size_t>(tasks));
  for (int a = int(Arg::loss); a < kArgs; ++a) {
    const auto& part = arguments.real[a];
    const size_t size = part.size() / size_t(tasks);
    for (size_t i = 0; i < part.size(); ++i) all[i / size].push_back(double(part[i]));
  }
  return all;
}

double worst(const Results& a, const Results& b) {
  double error = 0, scale = 0;
  for (const auto& task : b)
    for (const double v : task) scale = std::max(scale, std::fabs(v));
  for (size_t t = 0; t < a.size(); ++t) {
    if (a[t].size() != b[t].size()) return INFINITY;
    for (size_t i = 0; i < a[t].size(); ++i) error = std::max(error, std::isnan(a[t][i]) ? INFINITY : std::fabs(a[t][i] - b[t][i]) / scale);
  }
  return error;
}

// The reference's numbers are drawn in float64: task t's are the same for any number of tasks only where tasks come first.
template <class T>
void against_the_reference(const std::string& isa, double tolerance) {
  const OpTable& table = *cpu_ops(sizeof(T)).in_lanes->table;
  const int64_t L = table.lanes;
  std::set<Op> used;
  for (const Case& c : cases()) {
    const std::string label = isa + (sizeof(T) == 4 ? " float " : " double ") + c.name;
    for (const int64_t tasks : {int64_t(1), L - 1, L, L + 3}) {
      const double error = worst(results<T>(table, c, tasks, 1, false, &used), results<double>(reference_ops(), c, tasks));
      expect(error < tolerance, label + ", " + std::to_string(tasks) + " tasks", error);
    }
    const Results whole = results<T>(table, c, L + 3), first = results<T>(table, c, 1);
    expect(first[0] == whole[0], label + ": a task alone has the same bits", 0);
    expect(results<T>(table, c, L + 3, 2) == whole, label + ": two threads, the same bits", 0);
    expect(results<T>(table, c, L + 3, 1, true) == whole, label + ": layered, the same bits", 0);
  }
  for (int op = 0; op < kOps; ++op)
    if (table.run[op] && !used.count(Op(op))) expect(false, isa + ": no case runs " + op_name(Op(op)), 0);
}

// On the reference the Schedule for lanes is the same work: the same bits.
void the_schedule_is_the_same_work() {
  const OpTable& table = reference_ops();
  for (const Case& c : cases()) {
    const Program net = Program::parse(c.network);
    const Schedule plain = c.schedule(net), lanes = lane_schedule(plain);
    Arguments<double> a(plain, 11, 3), b(plain, 11, 3);
    const Workspace space_a = plan_workspace(plain, table), space_b = plan_workspace(lanes, table);
    Arenas arenas;
    run_resident(Run{table, plain, space_a, a.views, 11, 1}, arenas, 1, one_thread);
    run_resident(Run{table, lanes, space_b, b.views, 11, 8}, arenas, 1, one_thread);
    expect(a.real == b.real, "reference, " + c.name + ": the same bits with lanes", 0);
  }
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  the_schedule_is_the_same_work();
  for (const std::string& isa : available_cpu_isas()) {
    set_cpu_isa(isa);
    against_the_reference<double>(isa, 1e-10);
    against_the_reference<float>(isa, 2e-4);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
