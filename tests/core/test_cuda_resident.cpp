// The resident walk of the emulated CUDA table: one launch computes what the reference computes and what the layered walk computes, with
// the same bits in every order of threads and whatever the batch; every op it has is met; and it declines with its reasons.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <set>
#include <stdexcept>

#include "cuda/cuda_tables.h"
#include "cuda/emulated/emu.h"
#include "networks.h"
#include "plan/fuse.h"
#include "task_results.h"

namespace fastmaml {
namespace {

int passed = 0, failed = 0;
std::set<Op> met;

void report(bool ok, const std::string& what, const std::string& detail = "") {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAIL  %s  %s\n", what.c_str(), detail.c_str());
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1e", value);
  return text;
}

// ---------------------------------------------------------------- networks

// A chain of linear layers with `between` behind each but the last: text with %v for the value before it, and %p, %q for two parameters
// of its size.
struct Mlp {
  std::vector<int64_t> sizes;
  std::string between = "tanh %v\n";
  std::string loss = "mse";

  std::string text() const {
    std::string params, lines;
    int64_t at = 0;
    int param = 0, value = 0;
    const auto add = [&](int64_t size, const std::string& dims) {
      params += "param " + std::to_string(at) + " " + dims + "\n";
      at += size;
      return std::to_string(param++);
    };
    for (size_t l = 0; l + 1 < sizes.size(); ++l) {
      const std::string in = std::to_string(sizes[l]), out = std::to_string(sizes[l + 1]);
      const std::string w = add(sizes[l] * sizes[l + 1], out + " " + in), b = add(sizes[l + 1], out);
      lines += "linear " + std::to_string(value++) + " weight=" + w + " bias=" + b + "\n";
      if (l + 2 == sizes.size()) break;
      std::string more = between;
      const auto fill = [&](const std::string& name, const std::function<std::string()>& by) {
        for (size_t i; (i = more.find(name)) != std::string::npos;) more.replace(i, 2, by());
      };
      fill("%v", [&] { return std::to_string(value++); });
      fill("%p", [&] { return add(sizes[l + 1], out); });
      fill("%q", [&] { return add(sizes[l + 1], out); });
      lines += more;
    }
    return "fastmaml 1\ninput " + std::to_string(sizes[0]) + "\n" + params + lines + "output " + std::to_string(value) + "\nloss " + loss +
           "\n";
  }
};

// An image, which flatten turns, and a residual add.
const char* const kFlat = R"(fastmaml 1
input 2 3 5
param 0 30 30
param 900 30
param 930 3 30
param 1020 3
flatten 0
linear 1 weight=0 bias=1
silu 2
add 1,3
linear 4 weight=2 bias=3
output 5
loss cross_entropy smoothing=0.1
)";

// ---------------------------------------------------------------- walks

struct How {
  int64_t tasks = 3;             // of the batch
  int64_t first = 0, count = 0;  // which of them the walk takes; 0: all
  int64_t classes = 3;
};

template <class T, class Walk>
Results results(const Schedule& schedule, const How& how, const Walk& walk) {
  Arguments<T> arguments(schedule, how.tasks, how.classes);
  for (T& v : arguments.real[static_cast<int>(Arg::buffers)]) v = std::fabs(v) + T(0.25);
  for (T& v : arguments.real[static_cast<int>(Arg::step_count)]) v = T(2);
  for (T& v : arguments.real[static_cast<int>(Arg::state)]) v = std::fabs(v);
  const int64_t count = how.count ? how.count : how.tasks;
  View views[kArgs];
  for (int a = 0; a < kArgs; ++a) {
    views[a] = arguments.views[a];
    const size_t bytes = arguments.label[a].empty() ? sizeof(T) : sizeof(int64_t);
    if (views[a]) views[a].data = static_cast<std::byte*>(views[a].data) + size_t(how.first * views[a].task_stride) * bytes;
  }
  walk(views, count);
  Results out;
  for (int a = static_cast<int>(Arg::loss); a < kArgs; ++a) {
    const std::vector<T>& all = arguments.real[a];
    const auto size = std::ptrdiff_t(all.size()) / how.tasks;
    out.emplace_back(all.begin() + how.first * size, all.begin() + (how.first + count) * size);
  }
  return out;
}

template <class T>
Results layered(const OpTable& table, const Schedule& schedule, const How& how) {
  const Workspace workspace = plan_workspace(schedule, table);
  Arenas arenas;
  return results<T>(schedule, how,
                    [&](const View* args, int64_t tasks) { run_layered({table, schedule, workspace, args, tasks}, arenas); });
}

template <class T>
const ResidentWalk& walk_of() {
  return *cuda_emulated_ops(sizeof(T)).resident;
}

// Its Steps and its arena lie in guarded buffers of the emulated device.
template <class T>
Results resident(const Schedule& schedule, const ResidentCode& code, const How& how) {
  if (!code.refusal.empty()) throw std::runtime_error("declined: " + code.refusal);
  return results<T>(schedule, how, [&](const View* args, int64_t tasks) {
    void* steps = emu::allocate(code.steps.size());
    std::memcpy(steps, code.steps.data(), code.steps.size());
    void* arena = emu::allocate(code.arena_bytes * size_t(tasks));
    walk_of<T>().launch(code, steps, args, arena, tasks, 0);
    emu::free(arena);
    emu::free(steps);
  });
}

// The worst entry, relative to the largest of the result it is in.
double worst(const Results& got, const Results& want) {
  double w = 0;
  for (size_t a = 0; a < want.size(); ++a) {
    double scale = 0;
    for (double v : want[a]) scale = std::max(scale, std::fabs(v));
    for (size_t i = 0; i < want[a].size(); ++i) {
      const double error = got[a][i] == want[a][i] ? 0 : std::fabs(got[a][i] - want[a][i]) / scale;
      w = std::isnan(error) ? INFINITY : std::max(w, error);
    }
  }
  return w;
}

// ---------------------------------------------------------------- checks

template <class T>
void check(const std::string& name, const Schedule& schedule, const Results& definition, How how, double tolerance, size_t fast_bytes) {
  const std::string label = name + (sizeof(T) == 4 ? " float32" : " float64");
  try {
    const ResidentCode code = walk_of<T>().encode(schedule, fast_bytes);
    const int64_t before = emu::launches();
    const Results got = resident<T>(schedule, code, how);
    report(emu::launches() == before + 1, label + ": is one launch");
    report(worst(got, definition) <= tolerance, label + " against the reference", number(worst(got, definition)));
    if (emu::watched()) return;  // else the same accesses again, whose bits the other build compares, and ops that test_cuda_ops watches
    const double from_layered = worst(got, layered<T>(cuda_emulated_ops(sizeof(T)), schedule, how));
    report(from_layered <= tolerance, label + " against the layered walk", number(from_layered));
    for (const emu::Order order : {emu::Order::descending, emu::Order::random}) {
      emu::set_order(order, 3);
      report(resident<T>(schedule, code, how) == got, label + ": the same bits in another order of threads");
    }
    emu::set_order(emu::Order::ascending);
    if (how.tasks == 1) return;
    How last = how;
    last.first = how.tasks - 1;
    last.count = 1;
    report(last_task_is(got, resident<T>(schedule, code, last)), label + ": the last task alone has the same bits");
  } catch (const std::exception& e) {
    emu::set_order(emu::Order::ascending);
    report(false, label, e.what());
  }
}

constexpr size_t kFast = 227 * 1024;

// The Schedule as a plan has it: fused.
void check_both(const std::string& name, const Schedule& written, How how = {}, size_t fast_bytes = kFast) {
  const Schedule schedule = fuse(written, [](Op op) { return cuda_emulated_ops(sizeof(float)).supports(op); });
  for (const Step& step : schedule.steps) met.insert(step.op);
  const Results definition = layered<double>(reference_ops(), schedule, how);
  check<double>(name, schedule, definition, how, 1e-11, fast_bytes);  // sums in another order, through a few inner steps
  check<float>(name, schedule, definition, how, 3e-5, fast_bytes);    // the same in float32, where no mask flips
}

InnerLoopSpec spec_of(const std::string& loop, int64_t support = 5, int64_t query = 3) {
  InnerLoopSpec spec;
  spec.support_examples = support;
  spec.query_examples = query;
  spec.loop = InnerLoop::parse(loop);
  return spec;
}

// All computations on one network.
void network(const std::string& name, const std::string& text, const How& how = {}) {
  const Program net = Program::parse(text);
  InnerLoopSpec low = spec_of("steps=2 rate_grad=1"), stash = low;
  stash.stash = stash.rates_per_step = stash.support_weights = true;
  check_both(name + " meta-gradient, low memory", meta_gradient_schedule(net, low), how);
  check_both(name + " meta-gradient, stash", meta_gradient_schedule(net, stash), how);
  check_both(name + " first order", meta_gradient_schedule(net, spec_of("steps=2 order=0 rate_grad=1")), how);
  check_both(name + " adapt", adapt_schedule(net, low), how);
  check_both(name + " forward", forward_schedule(net, 3, 5), how);
  check_both(name + " passes", passes_schedule(net, 3, true), how);
  if (net.uses_support_stats()) return;
  check_both(name + " gradient", gradient_schedule(net, 5, true), how);
  check_both(name + " hvp", hvp_schedule(net, 5, true), how);
  check_both(name + " vjp", vjp_schedule(net, 4), how);
  for (const bool masked : {false, true})
    check_both(name + " conjugate gradients", conjugate_gradient_schedule(net, 5, false, masked, 3), how);
}

void networks() {
  network("mlp", kMlp);
  network("flat", kFlat);
  const std::string layer_norm = "layer_norm %v weight=%p bias=%q dims=1 eps=1e-5\ntanh %v\n";
  network("layer norm", Mlp{{3, 9, 4}, layer_norm, "mse"}.text());
  network("group norm",
          Mlp{{3, 12, 8, 3}, "group_norm %v weight=%p bias=%q groups=2 eps=1e-5\ngelu %v\n", "cross_entropy smoothing=0"}.text());
  const std::string norm = "batch_norm %v weight=%p bias=%q eps=1e-5 mode=", relu = "\nleaky_relu %v slope=0.1\n";
  network("batch norm", Mlp{{3, 9, 8, 3}, norm + "batch" + relu, "cross_entropy smoothing=0.2"}.text());
  network("batch norm of support", Mlp{{3, 9, 3}, norm + "support" + relu, "cross_entropy smoothing=0"}.text());
  std::string frozen = Mlp{{3, 9, 3}, norm + "frozen mean=0 var=1" + relu, "mse"}.text();
  frozen.insert(frozen.find("linear"), "buffer 0 9\nbuffer 9 9\n");
  network("frozen batch norm", frozen);
}

// Odd sizes, and every number of steps and tasks.
void sizes() {
  for (const int64_t size : {1, 2, 3, 5, 31, 33, 65}) {
    How how;
    how.tasks = 1 + size % 3;
    const Program net = Program::parse(Mlp{{size, size + 1, 2}, "gelu_tanh %v\n"}.text());
    check_both("size " + std::to_string(size), meta_gradient_schedule(net, spec_of("steps=1", size > 5 ? 7 : size, 2)), how);
  }
  for (const int64_t classes : {1, 2, 5, 33}) {
    How how;
    how.classes = classes;
    const Program net = Program::parse(Mlp{{4, 8, classes}, "sigmoid %v\n", "cross_entropy smoothing=0.1"}.text());
    check_both("classes " + std::to_string(classes), meta_gradient_schedule(net, spec_of("steps=1")), how);
  }
  const Program net = Program::parse(Mlp{{2, 20, 20, 1}, "relu %v\n"}.text());
  for (const int K : {1, 2, 3, 5})
    for (const bool stash : {false, true}) {
      InnerLoopSpec spec = spec_of("steps=" + std::to_string(K));
      spec.stash = stash;
      How tasks;
      tasks.tasks = K;
      check_both("K = T = " + std::to_string(K) + (stash ? " stash" : " low"), meta_gradient_schedule(net, spec), tasks);
    }
  // Tall tiles, and sums that many threads share.
  check_both("tall tiles", meta_gradient_schedule(Program::parse(Mlp{{36, 40, 4}}.text()), spec_of("steps=1", 33, 2)), {2, 0, 0, 3});
}

void inner_loops() {
  const Program net = Program::parse(kMlp);
  struct Loop {
    const char* text;
    bool mask = false;
  };
  for (const Loop& loop : {Loop{"steps=2 weight_decay=0.01 rate_grad=1"},
                           {"steps=2 proximal=1 rate_grad=1"},
                           {"steps=2 clip_value=0.05 rate_grad=1"},
                           {"steps=2 clip_norm=0.3 rate_grad=1", true},
                           {"steps=2 clip_norm=0.3", false},
                           {"steps=3 momentum=0.9 dampening=0.2 rate_grad=1"},
                           {"steps=3 momentum=0.9 nesterov=1 rate_grad=1"},
                           {"steps=3 rule=adam eps=1e-3 rate_grad=1"},
                           {"steps=2 rule=adam eps=1e-3 weight_decay=0.1 decoupled=1 rate_grad=1"},
                           {"steps=3 queries=1,2,3"}})
    for (const bool stash : {false, true}) {
      InnerLoopSpec spec = spec_of(loop.text);
      spec.stash = stash;
      spec.mask = loop.mask;
      spec.loss_weights = spec.loop.queries.size() > 1;
      check_both(std::string(loop.text) + (stash ? " stash" : " low"), meta_gradient_schedule(net, spec));
      if (stash || spec.loss_weights) continue;
      spec.state = spec.loop.states() > 0;
      spec.step_count = spec.loop.states() > 1;
      check_both(std::string(loop.text) + " adapt", adapt_schedule(net, spec));
    }
}

// Where a task's numbers do not all fit, the long rows of phi[k] lie in the arena.
void memory() {
  const Program net = Program::parse(Mlp{{2, 20, 20, 1}, "relu %v\n"}.text());
  const Schedule schedule = meta_gradient_schedule(net, spec_of("steps=5"));
  const ResidentCode whole = walk_of<float>().encode(schedule, kFast);
  report(whole.refusal.empty() && whole.arena_bytes == 0, "all slots lie in shared memory where they fit");
  const size_t part = whole.shared_bytes * 2 / 3;
  const ResidentCode cut = walk_of<float>().encode(schedule, part);
  report(cut.refusal.empty() && cut.arena_bytes > 0 && cut.shared_bytes < part, "what does not fit lies in the arena", cut.refusal);
  check_both("with an arena", schedule, {}, 2 * part);  // float64 needs twice the room
  check<float>("with an arena, once more", schedule, layered<double>(reference_ops(), schedule, {}), {}, 3e-5, part);
}

void refusals() {
  const auto sentence = [](const Schedule& schedule, size_t fast_bytes, const std::string& part) {
    for (const size_t bytes : {sizeof(float), sizeof(double)}) {
      const std::string got = cuda_emulated_ops(bytes).resident->encode(schedule, fast_bytes).refusal;
      report(got.find(part) != std::string::npos, "declines with \"" + part + "\"", "got \"" + got + "\"");
    }
  };
  const InnerLoopSpec spec = spec_of("steps=2");
  sentence(meta_gradient_schedule(Program::parse(kConvnet), spec), kFast, "the resident walk has no conv2d_fwd");
  sentence(meta_gradient_schedule(Program::parse(Mlp{{3, 9, 2}, "tanh %v\n", "caller"}.text()), spec), kFast,
           "the loss is written in Python");
  sentence(meta_gradient_schedule(Program::parse(Mlp{{2, 40, 40, 1}}.text()), spec), 8192, "and a block has 8 KB");
  sentence(meta_gradient_schedule(Program::parse(Mlp{{64, 300, 300, 5}}.text()), spec), kFast,
           "of shared memory, or most of them, and a block has 227 KB");
  sentence(meta_gradient_schedule(Program::parse(Mlp{{100, 100, 100, 1}}.text()), spec_of("steps=1", 2000, 2000)), kFast,
           "products each, more than the 1048576");
  report(cuda_emulated_ops(4).resident->encode(meta_gradient_schedule(Program::parse(kMlp), spec), kFast).refusal.empty(),
         "does not decline a small network");
}

// Both kernels ran, and every op of the backend was walked but those of convolutions and pools, alone or fused.
void coverage() {
  int kernels = 0;
  for (const auto& [name, kernel] : emu::kernels()) kernels += name.find("8resident") != std::string::npos;
  report(kernels == 2, "the walks of float32 and float64 ran");
  for (int op = 0; op < kOps; ++op) {
    const std::string name = op_name(Op(op));
    const auto is = [&](const char* part) { return name.find(part) != std::string::npos; };
    const bool other = is("2d") || is("norm_pool_act") || !cuda_emulated_ops(4).supports(Op(op));
    report(other != (met.count(Op(op)) > 0), name + (other ? " was not to be met" : " was walked"));
  }
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  emu::set_order(emu::Order::ascending);
  networks();
  sizes();
  inner_loops();
  memory();
  coverage();
  refusals();
  std::printf("%d passed, %d failed, %ld launches\n", passed, failed, long(emu::launches()));
  return failed != 0;
}
