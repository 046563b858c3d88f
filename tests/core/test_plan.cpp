// How a plan is made: the stages that rewrite its Schedule and what each does to it, the arena, the layout of tasks, and which memory
// "auto" takes.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "networks.h"
#include "plan/fuse.h"
#include "plan/plan.h"
#include "plan/rewrite.h"
#include "plan/stash_budget.h"

namespace fastmaml {
namespace {

int passed = 0, failed = 0;

void report(bool ok, const std::string& what, const std::string& detail = "") {
  ok ? ++passed : ++failed;
  std::printf("%s  %s  %s\n", ok ? "ok  " : "FAIL", what.c_str(), detail.c_str());
}

int count(const Schedule& schedule, Op op) {
  return int(std::count_if(schedule.steps.begin(), schedule.steps.end(), [op](const Step& step) { return step.op == op; }));
}

CallSpec call_for(const std::string& loop, int64_t support, int64_t query, Memory memory = Memory::low, bool uniform_rate = false) {
  CallSpec call;
  call.computation = Computation::meta_gradient;
  call.memory = memory;
  call.spec.loop = InnerLoop::parse(loop);
  call.spec.support_examples = support;
  call.spec.query_examples = query;
  call.spec.uniform_rate = uniform_rate;
  return call;
}

CallSpec call_for(Computation computation, int64_t support) {
  CallSpec call;
  call.computation = computation;
  call.spec.support_examples = support;
  return call;
}

// What every stage leaves of a Schedule, and the names of those that took part.
struct Stages {
  std::vector<std::string> names;
  std::vector<Schedule> left;

  Stages(const Schedule& written, const OpTable& table) {
    const Schedule last = rewritten(written, table, [&](const char* stage, const Schedule& schedule) {
      names.emplace_back(stage);
      left.push_back(schedule);
    });
    report(to_string(last) == to_string(left.back()), "the last stage leaves the result");
  }

  std::string order() const {
    std::string all;
    for (const std::string& name : names) all += (all.empty() ? "" : " ") + name;
    return all;
  }
  Schedule after(const std::string& name) const { return at(place_of(name)); }
  Schedule before(const std::string& name) const { return at(place_of(name) - 1); }

 private:
  std::ptrdiff_t place_of(const std::string& name) const { return std::find(names.begin(), names.end(), name) - names.begin(); }
  const Schedule& at(std::ptrdiff_t place) const {  // empty where there is no such stage
    static const Schedule none;
    return place < 0 || place >= std::ptrdiff_t(left.size()) ? none : left[size_t(place)];
  }
};

// ---------------------------------------------------------------- the stages

// A table that claims to be a device's: the stages ask no more of it.
OpTable as_device(OpTable table) {
  static const Device device{};
  table.device = &device;
  return table;
}

void order() {
  const Program net = Program::parse(kRectifiedMlp);
  const Schedule written = meta_gradient_schedule(net, call_for("steps=2", 5, 3).spec);
  const OpTable& cpu = cpu_ops(4);
  const auto expect = [&](const std::string& what, const OpTable& table, const std::string& names) {
    const std::string got = Stages(written, table).order();
    report(got == names, what + ": " + names, "got " + got);
  };
  expect("host, one task after the other", cpu, "fuse stream chunk_examples fuse_updates");
  expect("host, tasks side by side", *cpu.in_lanes->table, "fuse stream lane_schedule fuse_updates");
  expect("the reference, whose lanes are any", reference_ops(), "fuse stream chunk_examples fuse_updates");
  expect("a device", as_device(cpu), "fuse fuse_updates");
}

void fuses() {
  const Program net = Program::parse(kMlp);
  CallSpec call = call_for("steps=2 rate_grad=1", 5, 3);
  const Schedule written = meta_gradient_schedule(net, call.spec);
  const Schedule fused = Stages(written, cpu_ops(4)).after("fuse");
  report(count(written, Op::sgd_adjoint) == 0 && count(written, Op::adjoint_update) == 2, "the sweep is written as parts");
  report(count(fused, Op::sgd_adjoint) == 2 && count(fused, Op::adjoint_update) == 0 && count(fused, Op::rate_grad) == 0,
         "fuse makes an sgd_adjoint of each inner step's parts");
  report(count(written, Op::pointwise_fwd_dual) == 0 && count(fused, Op::pointwise_fwd_dual) == 2,
         "fuse makes a dual of a pointwise function and its tangent");
}

// A convolution whose output is larger than a cache, with a norm behind it.
const char* const kLargeImages = R"(fastmaml 1
input 3 40 40
param 0 32 3 3 3
param 864 32
param 896 32
param 928 2 51200
conv2d 0 weight=0 bias=-1 stride=1,1 padding=1,1
batch_norm 1 weight=1 bias=2 eps=1e-5 mode=batch
relu 2
flatten 3
linear 4 weight=3 bias=-1
output 5
loss cross_entropy smoothing=0
)";

void streams() {
  const OpTable& cpu = cpu_ops(4);
  const Program net = fuse(Program::parse(kLargeImages), {[&](Op op) { return cpu.supports(op); }, cpu.rectifies, cpu.out_in});
  const Stages large(gradient_schedule(net, 40, false), cpu), small(gradient_schedule(net, 2, false), cpu);
  const Op made = Op::norm_pool_act_bwd_data, read = Op::conv2d_bwd_weight;
  report(count(large.before("stream"), made) == 1 && count(large.after("stream"), made) > 1, "stream makes a large gradient in parts",
         std::to_string(count(large.after("stream"), made)) + " parts");
  report(count(large.after("stream"), made) == count(large.after("stream"), read), "each part is read before the next is made");
  const std::vector<Step>& steps = large.after("stream").steps;
  const auto first = std::find_if(steps.begin(), steps.end(), [&](const Step& step) { return step.op == made; });
  bool in_turn = true;
  int64_t examples = 0;
  for (auto step = first; step != steps.end() && in_turn; ++step) {
    if (step->op != made) continue;
    examples += step->examples;
    in_turn = step + 1 != steps.end() && (step + 1)->op == read && (step + 1)->examples == step->examples;
  }
  report(in_turn && examples == 40, "the parts take turns over all examples", std::to_string(examples) + " examples");
  report(to_string(small.before("stream")) == to_string(small.after("stream")), "stream leaves a small gradient as it is");
}

void chunks() {
  const OpTable& cpu = cpu_ops(4);
  const Program net = with_torch_weights(Program::parse(kMlp));
  CallSpec many = call_for("steps=2", 20'000, 20'000, Memory::low, true), few = call_for("steps=2", 5, 3, Memory::low, true);
  many.spec.support_weights = many.spec.query_weights = true;  // a loss without them divides by all examples and stays whole
  const Stages large(meta_gradient_schedule(net, many.spec), cpu), small(meta_gradient_schedule(net, few.spec), cpu);
  const int before = count(large.before("chunk_examples"), Op::linear_bwd_weight),
            after = count(large.after("chunk_examples"), Op::linear_bwd_weight);
  report(after > 2 * before, "chunk_examples takes many examples a few at a time",
         std::to_string(before) + " Steps become " + std::to_string(after));
  report(to_string(small.before("chunk_examples")) == to_string(small.after("chunk_examples")), "chunk_examples leaves few examples alone");
  // fuse_updates comes last: the sum of a chunk's gradients is no product.
  report(count(small.before("fuse_updates"), Op::uniform_update) == 2 && count(small.after("fuse_updates"), Op::uniform_update) == 0 &&
             count(small.after("fuse_updates"), Op::linear_update) == 4,
         "fuse_updates makes each layer's update a part of its weight gradient");
  report(count(large.after("fuse_updates"), Op::uniform_update) == 2 && count(large.after("fuse_updates"), Op::linear_update) == 0,
         "fuse_updates leaves an update whose gradient chunks add up");
}

void lanes() {
  const OpTable& table = *cpu_ops(4).in_lanes->table;
  const Program net = Program::parse(kMlp);
  const Stages stages(meta_gradient_schedule(net, call_for("steps=2", 5, 3).spec), table);
  const Schedule &before = stages.before("lane_schedule"), &after = stages.after("lane_schedule");
  report(count(after, Op::copy) > count(before, Op::copy), "lane_schedule copies arguments in and results out",
         std::to_string(count(after, Op::copy) - count(before, Op::copy)) + " copies");
  bool only_copies = true;
  for (const Step& step : after.steps)
    for (const Operand& operand : step.operand) {
      if (!operand || step.op == Op::copy) continue;
      const Slot& slot = after.slots[size_t(operand.slot)];
      only_copies = only_copies && (slot.arg == Arg::none || slot.arg == Arg::rates || slot.type == Type::label);
    }
  report(only_copies, "then only copies, labels and rates see an argument");
}

// ---------------------------------------------------------------- the plan

// Slots that are alive at the same time lie apart, and all inside the arena.
void arena(const std::string& what, const Plan& plan) {
  const std::vector<LiveRange> ranges = live_ranges(plan.schedule, plan.table->real_bytes);
  bool apart = !ranges.empty(), inside = true, shares = false;
  for (const LiveRange& a : ranges) {
    const size_t at = plan.workspace.offset[size_t(a.slot)];
    inside = inside && at % 64 == 0 && at + a.bytes <= plan.workspace.task_bytes;
    for (const LiveRange& b : ranges) {
      if (a.slot >= b.slot) continue;
      const size_t other = plan.workspace.offset[size_t(b.slot)];
      const bool meet = at < other + b.bytes && other < at + a.bytes;
      apart = apart && !(meet && a.overlaps(b));
      shares = shares || meet;
    }
  }
  report(apart && inside, what + ": slots that are alive together lie apart in the arena",
         std::to_string(ranges.size()) + " slots in " + std::to_string(plan.workspace.task_bytes) + " bytes");
  report(shares, what + ": others share their places");
}

void plans() {
  for (const auto& [name, text] : {std::pair{"mlp", kMlp}, {"convnet", kConvnet}, {"rectified", kRectified}}) {
    const std::string what(name);
    for (const OpTable* table : {&cpu_ops(4), &cpu_ops(8), &reference_ops()}) {
      const std::string where = what + " on " + table->backend + ", " + std::to_string(table->real_bytes) + " bytes";
      const CallSpec call = call_for("steps=3 rate_grad=1", 6, 4);
      const auto plan = plan_for(text, *table, call);
      report(plan == plan_for(text, *table, call), where + ": the same call takes the same plan");
      report(plan->memory == Memory::low && plan->schedule.steps.size() > 0, where + ": low memory where it is asked for");
      // The text is a plan's key: another one makes the plan again.
      const auto again = plan_for(std::string(text) + "\n", *table, call);
      report(plan != again && to_string(plan->schedule) == to_string(again->schedule) &&
                 plan->workspace.offset == again->workspace.offset && plan->arena_bytes() == again->arena_bytes(),
             where + ": a plan that is made twice comes out the same");
      report(to_string(plan->schedule) == to_string(rewritten(meta_gradient_schedule(*plan->program, call.spec), *plan->table)),
             where + ": the Schedule is what the stages leave of the network as the table runs it");
      arena(where, *plan);
    }
  }
}

void layouts() {
  const OpTable& cpu = cpu_ops(4);
  const auto lanes_of = [&](const char* text, int64_t examples) {
    return plan_for(text, cpu, call_for("steps=1", examples, examples))->lanes();
  };
  report(lanes_of(kMlp, 5) == cpu.in_lanes->table->lanes && lanes_of(kMlp, 5) > 1, "a small network's tasks go side by side",
         std::to_string(lanes_of(kMlp, 5)) + " lanes");
  report(lanes_of(kMlp, 100'000) == 1, "with many examples they go one after the other");
  report(lanes_of(kConvnet, 5) == 1, "and where lanes lack a layer");
  set_cpu_layout(Layout::tasks);
  report(lanes_of(kMlp, 5) == 1, "set_cpu_layout(tasks) keeps them apart");
  set_cpu_layout(Layout::lanes);
  report(lanes_of(kMlp, 100'000) > 1 && lanes_of(kConvnet, 5) == 1, "set_cpu_layout(lanes) takes lanes where the network runs so");
  set_cpu_layout(Layout::automatic);
}

// ---------------------------------------------------------------- memory="auto"

void budget() {
  const OpTable& cpu = cpu_ops(4);
  const auto plan = [&](const std::string& text, int64_t examples, Memory memory) {
    return plan_for(text, cpu, call_for("steps=2", examples, 3, memory));
  };
  const auto small = plan(kConvnet, 5, Memory::automatic);
  report(small->memory == Memory::stash && to_string(small->schedule) == to_string(plan(kConvnet, 5, Memory::stash)->schedule),
         "auto keeps the activations that the budget has room for");
  // An arena for each number of examples: more than the budget, whatever the machine.
  const size_t of_100 = plan(kConvnet, 100, Memory::stash)->arena_bytes();
  const int64_t too_many = int64_t(100 * stash_budget(cpu, false) / of_100) * 2;
  const auto large = plan(kConvnet, too_many, Memory::automatic);
  report(plan(kConvnet, too_many, Memory::stash)->arena_bytes() > stash_budget(cpu, false), "a stash over the budget",
         std::to_string(too_many) + " examples");
  report(large->memory == Memory::low && to_string(large->schedule) == to_string(plan(kConvnet, too_many, Memory::low)->schedule),
         "auto is low memory then");

  std::string in_python = kConvnet;
  in_python = in_python.substr(0, in_python.find("loss ")) + "loss caller\n";
  const size_t at_once = stash_budget(cpu, true);
  int64_t examples = 100;
  while (plan(in_python, examples, Memory::stash)->arena_bytes() <= at_once) examples *= 2;
  report(examples < too_many && plan(in_python, examples, Memory::automatic)->memory == Memory::low &&
             plan(in_python, examples / 2, Memory::automatic)->memory == Memory::stash,
         "with a loss written in Python all tasks' arenas count at once, and the budget is less", std::to_string(examples) + " examples");
}

// A linearisation and its product are two plans of one network, and the first leaves what the second reads.
void parts() {
  const OpTable& cpu = cpu_ops(4);
  for (const auto& [name, text] : {std::pair{"mlp", kMlp}, {"convnet", kConvnet}})
    for (const Curvature curvature : {Curvature::hessian, Curvature::gauss_newton}) {
      CallSpec made = call_for(Computation::linearise, 6), read = call_for(Computation::curvature, 6);
      made.curvature = read.curvature = curvature;
      const auto size = [&](const CallSpec& call, Arg arg) {
        for (const Slot& slot : plan_for(text, cpu, call)->schedule.slots)
          if (slot.arg == arg) return slot.size;
        return int64_t(0);
      };
      const int64_t left = size(made, Arg::tape_made), taken = size(read, Arg::tape);
      report(left > 0 && left == taken && size(made, Arg::tape_index_made) == size(read, Arg::tape_index) &&
                 size(made, Arg::tape_tap_made) == size(read, Arg::tape_tap),
             std::string(name) + ": the tape of a linearisation fits its products", std::to_string(left) + " numbers");
    }
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  order();
  fuses();
  streams();
  chunks();
  lanes();
  plans();
  layouts();
  budget();
  parts();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
