// What a Step costs on paper, by examples counted by hand; and every op of every kind of Schedule has sizes for its operands.
#include <cstdio>
#include <string>

#include "networks.h"
#include "ops/step_clock.h"
#include "plan/cost.h"

namespace fastmaml {
namespace {

int passed = 0, failed = 0;

void expect_equal(double got, double want, const std::string& what) {
  got == want ? ++passed : ++failed;
  std::printf("%s  %s: %.17g, expected %.17g\n", got == want ? "ok  " : "FAIL", what.c_str(), got, want);
}

Cost cost(Op op, const Layer& layer, int64_t examples, std::initializer_list<int> absent = {}) {
  Step step;
  step.op = op;
  step.examples = step.stat_examples = examples;
  const size_t operands = roles(op).size();
  for (size_t i = 0; i < operands; ++i) step.operand[i].slot = 0;
  for (const int i : absent) step.operand[size_t(i)].slot = -1;
  return cost_of(step, layer, 4);
}

void by_hand() {
  const Linear linear{3, 5};
  // 7 examples: x 21, w 15, b 5, y 35 numbers; 7 * 3 * 5 multiply-adds
  expect_equal(cost(Op::linear_fwd, linear, 7).products, 210, "linear_fwd products");
  expect_equal(cost(Op::linear_fwd, linear, 7, {3}).bytes, 4 * (35 + 21 + 15), "linear_fwd bytes without a bias");
  expect_equal(cost(Op::linear_fwd_jvp, linear, 7, {6}).products, 420, "linear_fwd_jvp products");
  expect_equal(cost(Op::linear_fwd_jvp, linear, 7, {2, 6}).products, 210, "linear_fwd_jvp products without x_dot");
  expect_equal(cost(Op::linear_fwd_dual, linear, 7).products, 630, "linear_fwd_dual products");
  expect_equal(cost(Op::linear_bwd_data_dual, linear, 7).products, 630, "linear_bwd_data_dual products");
  expect_equal(cost(Op::linear_bwd_weight_jvp, linear, 7, {3}).products, 210, "linear_bwd_weight_jvp products without x_dot");

  const Conv2d conv{2, 6, 6, 4, 3, 3, 3, 3, 2, 2, 1, 1};
  // 5 examples: x 360, y 180, w 72, b 4 numbers; 180 outputs of 18 multiply-adds, padding counted
  expect_equal(cost(Op::conv2d_fwd, conv, 5).products, 2 * 180 * 18, "conv2d_fwd products");
  expect_equal(cost(Op::conv2d_fwd, conv, 5).bytes, 4 * (180 + 360 + 72 + 4), "conv2d_fwd bytes");
  expect_equal(cost(Op::conv2d_bwd_data_jvp, conv, 5, {5}).bytes, 4 * (360 + 2 * 180 + 2 * 72), "conv2d_bwd_data_jvp bytes");

  const Pool2d pool{2, 4, 4, 2, 2, 2, 2, 2, 2, 0, 0, false};
  expect_equal(cost(Op::max_pool2d_fwd, pool, 3).bytes, 4 * (24 + 96) + 4 * 24, "max_pool2d_fwd bytes with its int32 index");
  expect_equal(cost(Op::cross_entropy, Loss{Loss::Kind::cross_entropy, 5, 0}, 6).bytes, 4 * (1 + 2 * 30 + 6) + 8 * 6,
               "cross_entropy bytes with its int64 labels");
  expect_equal(cost(Op::sgd_update, Vector{100}, 1).other, 200, "sgd_update arithmetic");
  expect_equal(cost(Op::adjoint_update, Vector{100}, 1).bytes, 4 * (2 * 100 + 100), "adjoint_update reads what it writes");
  expect_equal(words_of(conv) == "conv2d 2x6x6 to 4x3x3, 3x3", 1, "a layer in words");
}

InnerLoopSpec loop(const char* text, bool stash) {
  InnerLoopSpec spec;
  spec.loop = InnerLoop::parse(text);
  spec.support_examples = 4;
  spec.query_examples = 6;
  spec.stash = stash;
  return spec;
}

double products(const Schedule& schedule, Phase phase) {
  double sum = 0;
  for (const Step& step : schedule.steps)
    if (step.phase == phase) sum += cost_of(step, schedule.layers[size_t(step.layer)], 4).products;
  return sum;
}

// K n_S (9F - 5F1) + n_Q (3F - F1), and 8F - 5F1 instead of 6F - 4F1 in the sweep where activations are computed again.
void meta_gradient() {
  const Program net = Program::parse(kMlp);
  const double F = 2 * (3 * 9 + 9 * 2), F1 = 2 * 3 * 9;
  for (const bool stash : {true, false}) {
    const Schedule schedule = meta_gradient_schedule(net, loop("steps=3", stash));
    const std::string mode = stash ? "stash" : "low";
    expect_equal(products(schedule, Phase::inner_gradient), 3 * 4 * (3 * F - F1), mode + ": inner gradients");
    expect_equal(products(schedule, Phase::query), 6 * (3 * F - F1), mode + ": query gradient");
    expect_equal(products(schedule, Phase::sweep), 3 * 4 * (stash ? 6 * F - 4 * F1 : 8 * F - 5 * F1), mode + ": sweep");
    expect_equal(products(schedule, Phase::whole) + products(schedule, Phase::update), 0, mode + ": elsewhere");
  }
}

// An operand's slot holds what operand_size says it takes, from its offset on.
void operands_fit() {
  int64_t checked = 0, beyond = 0;
  for (const char* text : {kMlp, kConvnet, kRectifiedMlp, kRectified})
    for (const char* words : {"steps=2", "steps=2 rule=adam clip_norm=1 rate_grad=1", "steps=2 momentum=0.9 weight_decay=0.1"})
      for (const bool stash : {true, false}) {
        const Schedule schedule = meta_gradient_schedule(Program::parse(text), loop(words, stash));
        for (const Step& step : schedule.steps) {
          const std::vector<Role> all = roles(step.op);
          for (size_t i = 0; i < all.size(); ++i) {
            if (!step.operand[i]) continue;
            const Slot& slot = schedule.slots[size_t(step.operand[i].slot)];
            const int64_t size = operand_size(schedule.layers[size_t(step.layer)], all[i].name, step.examples);
            ++checked;
            if (size > 0 && step.operand[i].offset + size <= slot.size) continue;
            ++beyond;
            std::printf("FAIL  %s of %s\n", std::string(all[i].name).c_str(), op_name(step.op));
          }
        }
      }
  expect_equal(double(beyond), 0, "operands that their slots do not hold, of " + std::to_string(checked));
}

// Every Step of every task is counted once, on the clock of the worker that took it.
void clocks_count_every_step() {
  const Schedule schedule = gradient_schedule(Program::parse(kMlp), 4, false);
  const Workspace workspace = plan_workspace(schedule, reference_ops());
  Arguments<double> arguments(schedule, 5, 3);
  Run run{reference_ops(), schedule, workspace, arguments.views, 5};
  std::vector<StepClock> clocks(2, StepClock(schedule.steps.size()));
  run.clocks = clocks.data();
  Arenas arenas;
  run_resident(run, arenas, 2, [](int64_t n, const std::function<void(int64_t)>& body) {
    for (int64_t i = 0; i < n; ++i) body(i);
  });
  bool all = true;
  for (size_t s = 0; s < schedule.steps.size(); ++s) {
    StepTime sum;
    for (const StepClock& clock : clocks) sum += clock.times()[s];
    all = all && sum.calls == 5 && sum.ns > 0;
  }
  expect_equal(all, 1, "five tasks on two workers: five calls of every Step");
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  by_hand();
  meta_gradient();
  operands_fit();
  clocks_count_every_step();
  std::printf("%d of %d checks passed\n", passed, passed + failed);
  return failed != 0;
}
