// Which layers fuse() joins, and whether the fused network computes what its parts do: in every pass, in float64, on the reference and,
// with what the cpu joins, on each of its instruction sets.
#include <cmath>
#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/isa/choose_isa.h"
#include "plan/fuse.h"
#include "plan/fuse_updates.h"
#include "same_numbers.h"

namespace fastmaml {
namespace {

bool everything(Op) { return true; }

// ---------------------------------------------------------------- what is joined

std::string kinds(const Program& net) {
  std::string text, line;
  std::istringstream lines(to_string(net));
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    std::string value, equals, kind;
    words >> value >> equals >> kind;
    if (equals != "=" || kind == "input") continue;
    text += (text.empty() ? "" : " ") + kind;
    for (std::string word; words >> word;)
      if (word.rfind("rectified=", 0) == 0 || word.rfind("mask=", 0) == 0) text += " " + word;
  }
  return text;
}

std::string net_of(const std::string& lines, const std::string& input = "2 6 5", const std::string& output = "") {
  const auto count = std::count(lines.begin(), lines.end(), '\n');
  return "fastmaml 1\ninput " + input + "\nparam 0 2\nparam 2 2\n" + lines + "output " + (output.empty() ? std::to_string(count) : output) +
         "\nloss none\n";
}

const std::string kNorm = "batch_norm 0 weight=0 bias=1 eps=1e-3 mode=batch\n", kPool = " kernel=2,2 stride=2,2 padding=0,0\n";

void expect_kinds(const std::string& what, const std::string& text, const std::string& want,
                  const std::function<bool(Op)>& supports = everything, bool rectifies = true) {
  const Program net = Program::parse(text), fused = fuse(net, {supports, rectifies});
  const std::string got = kinds(fused);
  const Shape &before = net.output_shape(), &after = fused.output_shape();
  report(got == want && before.size() == after.size() && before.image == after.image, what, got + " [" + want + "]");
}

void joins() {
  expect_kinds("norm, ReLU, pool", net_of(kNorm + "relu 1\nmax_pool2d 2" + kPool), "norm_pool_act");
  expect_kinds("norm, pool, ReLU", net_of(kNorm + "max_pool2d 1" + kPool + "relu 2\n"), "norm_pool_act");
  expect_kinds("norm, leaky ReLU", net_of(kNorm + "leaky_relu 1 slope=0.1\n"), "norm_pool_act");
  expect_kinds("vectors", net_of(kNorm + "relu 1\n", "2"), "norm_pool_act");
  expect_kinds("what stands before and behind stays", net_of("tanh 0\nbatch_norm 1 weight=0 bias=1 eps=1e-3 mode=batch\nrelu 2\nsilu 3\n"),
               "pointwise norm_pool_act pointwise");
  expect_kinds("a branch between norm and ReLU", net_of(kNorm + "tanh 0\nrelu 1\nadd 2,3\n"), "pointwise norm_pool_act add");
  expect_kinds("a slope of 0 is not a ReLU's 0", net_of(kNorm + "leaky_relu 1 slope=0\n"), "batch_norm pointwise");
  expect_kinds("a negative slope", net_of(kNorm + "leaky_relu 1 slope=-0.1\n"), "batch_norm pointwise");
  expect_kinds("another function", net_of(kNorm + "silu 1\n"), "batch_norm pointwise");
  expect_kinds("average pooling", net_of(kNorm + "avg_pool2d 1 count_include_pad=1" + kPool + "relu 2\n"),
               "batch_norm avg_pool2d pointwise");
  expect_kinds("a pool without a ReLU", net_of(kNorm + "max_pool2d 1" + kPool), "batch_norm max_pool2d");
  expect_kinds("the norm's output has a second reader", net_of(kNorm + "relu 1\nadd 1,2\n"), "batch_norm pointwise add");
  expect_kinds("the pool's output has a second reader", net_of(kNorm + "max_pool2d 1" + kPool + "relu 2\nadd 2,3\n"),
               "batch_norm max_pool2d pointwise add");
  expect_kinds("the norm's output is the network's", net_of(kNorm + "relu 1\n", "2 6 5", "1"), "batch_norm pointwise");
  expect_kinds("a window of 128 taps", net_of(kNorm + "max_pool2d 1 kernel=16,8 stride=1,1 padding=0,0\nrelu 2\n", "2 16 16"),
               "norm_pool_act");
  expect_kinds("a window whose taps do not fit a byte",
               net_of(kNorm + "max_pool2d 1 kernel=16,9 stride=1,1 padding=0,0\nrelu 2\n", "2 16 16"), "batch_norm max_pool2d pointwise");
  for (Op op : {Op::norm_pool_act_fwd, Op::norm_pool_act_fwd_jvp, Op::norm_pool_act_bwd_weight, Op::norm_pool_act_bwd_weight_jvp,
                Op::norm_pool_act_bwd_data, Op::norm_pool_act_bwd_data_jvp})
    expect_kinds(std::string("a backend without ") + op_name(op), net_of(kNorm + "relu 1\n"), "batch_norm pointwise",
                 [op](Op other) { return other != op; });
}

std::string conv(int from) { return "conv2d " + std::to_string(from) + " weight=2 bias=-1 stride=1,1 padding=0,0\n"; }
std::string linear(int from) { return "linear " + std::to_string(from) + " weight=2 bias=-1\n"; }

void rectifiers() {
  // All layers keep the size of what they read.
  const auto net = [](const std::string& head, const std::string& lines, const std::string& output) {
    const auto count = std::count(lines.begin(), lines.end(), '\n');
    return "fastmaml 1\n" + head + lines + "output " + (output.empty() ? std::to_string(count) : output) + "\nloss none\n";
  };
  const auto image = [&](const std::string& lines, const std::string& output = "") {
    return net("input 2 6 5\nparam 0 2\nparam 2 2\nparam 4 2 2 1 1\nparam 8 3 60\n", lines, output);
  };
  const auto vector = [&](const std::string& lines, const std::string& output = "") {
    return net("input 2\nparam 0 2\nparam 2 2\nparam 4 2 2\n", lines, output);
  };
  const std::string norm = "group_norm 1 weight=0 bias=1 eps=1e-3 groups=2\n", mean = "avg_pool2d 3 count_include_pad=1" + kPool;
  expect_kinds("linear, ReLU, linear", vector(linear(0) + "relu 1\n" + linear(2)), "linear rectified=0 linear mask=0");
  expect_kinds("three layers", vector(linear(0) + "relu 1\n" + linear(2) + "leaky_relu 3 slope=0.5\n" + linear(4)),
               "linear rectified=0 linear rectified=0.5 mask=0 linear mask=0.5");
  expect_kinds("conv2d, leaky ReLU, conv2d", image(conv(0) + "leaky_relu 1 slope=0.25\n" + conv(2)),
               "conv2d rectified=0.25 conv2d mask=0.25");
  expect_kinds("conv2d, ReLU, flatten, linear", image(conv(0) + "relu 1\nflatten 2\nlinear 3 weight=3 bias=-1\n"),
               "conv2d rectified=0 flatten linear mask=0");
  expect_kinds("group norm, ReLU, conv2d", image(conv(0) + norm + "relu 2\n" + conv(3)), "conv2d group_norm rectified=0 conv2d mask=0");
  expect_kinds("group norm, ReLU, pool", image(conv(0) + norm + "relu 2\n" + mean), "conv2d group_norm rectified=0 avg_pool2d");
  expect_kinds("group norm, ReLU, two readers", image(conv(0) + norm + "relu 2\n" + conv(3) + "add 3,4\n"),
               "conv2d group_norm rectified=0 conv2d add");
  expect_kinds("group norm, ReLU, output", image(conv(0) + norm + "relu 2\n"), "conv2d group_norm rectified=0");
  expect_kinds("group norm, two rectifiers", image(conv(0) + norm + "leaky_relu 2 slope=0.5\nrelu 3\n" + conv(4)),
               "conv2d group_norm rectified=0.5 pointwise conv2d");
  expect_kinds("a rectifier that is joined already", image(kNorm + "relu 1\n" + conv(2)), "norm_pool_act conv2d");
  expect_kinds("a pool reads y", image(conv(0) + "tanh 1\nrelu 2\n" + mean), "conv2d pointwise pointwise avg_pool2d");
  expect_kinds("the loss reads y", vector(linear(0) + "relu 1\n"), "linear pointwise");
  expect_kinds("two layers read y", vector(linear(0) + "relu 1\n" + linear(2) + linear(2) + "add 3,4\n"),
               "linear pointwise linear linear add");
  expect_kinds("y is the output as well", vector(linear(0) + "relu 1\n" + linear(2), "2"), "linear pointwise linear");
  expect_kinds("what is rectified has a second reader", vector(linear(0) + "relu 1\n" + linear(2) + "add 1,3\n"),
               "linear pointwise linear add");
  expect_kinds("what is rectified is a sum", vector("add 0,0\nrelu 1\n" + linear(2)), "add pointwise linear");
  expect_kinds("a slope of 0 before linear", vector(linear(0) + "leaky_relu 1 slope=0\n" + linear(2)), "linear pointwise linear");
  expect_kinds("a negative slope before linear", vector(linear(0) + "leaky_relu 1 slope=-0.1\n" + linear(2)), "linear pointwise linear");
  expect_kinds("another function before linear", vector(linear(0) + "tanh 1\n" + linear(2)), "linear pointwise linear");
  expect_kinds("a backend that does not rectify", vector(linear(0) + "relu 1\n" + linear(2)), "linear pointwise linear", everything, false);
}

// ---------------------------------------------------------------- the same numbers

void expect_error(const std::string& what, double error, double limit) {
  char text[80];
  std::snprintf(text, sizeof text, "%.1e of the largest", error);
  report(error <= limit, what, text);
}

// 1e-12 of the largest: the same formulas in float64, sums in another order. On the cpu also other formulas: 1e-10, as in test_walks.
// `part`: what the names of the ops that are fused begin with.
void same(const std::string& what, const Program& net, const std::function<Schedule(const Program&)>& schedule_of,
          const std::string& part = "batch_norm_fwd") {
  const Program fused = fuse(net, {everything, true});
  const Schedule parts_schedule = schedule_of(net), fused_schedule = schedule_of(fused);
  const std::string listing = to_string(fused_schedule);
  const Results want = results(parts_schedule), torch_weights = results(schedule_of(with_torch_weights(net)));  // as cpu has them
  expect_error(what, apart(want, results(fused_schedule)), 1e-12);
  report(to_string(parts_schedule).find(part) != std::string::npos && listing.find(part) == std::string::npos, what + ": is fused");
  for (const std::string& isa : available_cpu_isas()) {
    set_cpu_isa(isa);
    const OpTable& cpu = cpu_ops(8);
    const Schedule schedule = schedule_of(fuse(net, {[&](Op op) { return cpu.supports(op); }, cpu.rectifies, cpu.out_in}));
    expect_error(what + ": cpu " + isa, apart(torch_weights, results(schedule, cpu)), 1e-10);
  }
  set_cpu_isa("");
}

// Of the sweep's steps: exactly the same numbers, for nothing is added up in another order.
void same_sweep(const std::string& loop, int rate_grads, int adjoint_updates, int scales, int fused_steps) {
  const Program net = Program::parse(kMlp);
  InnerLoopSpec spec;
  spec.support_examples = 4;
  spec.query_examples = 3;
  spec.loop = InnerLoop::parse(loop);
  spec.loss_weights = spec.loop.queries.size() > 1;
  const Schedule parts = meta_gradient_schedule(net, spec), fused = fuse(parts, everything);
  const auto count = [&](Op op) {
    return int(std::count_if(fused.steps.begin(), fused.steps.end(), [op](const Step& s) { return s.op == op; }));
  };
  const std::string what = "sweep of " + loop;
  report(results(parts) == results(fused), what);
  report(count(Op::rate_grad) == rate_grads && count(Op::adjoint_update) == adjoint_updates && count(Op::scale_by_rate) == scales &&
             count(Op::sgd_adjoint) == fused_steps,
         what + ": is fused");
  report(to_string(fuse(parts, [](Op) { return false; })) == to_string(parts), what + ": is not without the op");
  const Schedule joint = fuse(parts, [](Op op) { return op != Op::sgd_adjoint; });
  const auto tangents = [](const Schedule& schedule, Op parted) {
    return std::count_if(schedule.steps.begin(), schedule.steps.end(), [&](const Step& s) { return s.op == parted; });
  };
  report(tangents(parts, Op::pointwise_bwd_jvp) > 0 && tangents(joint, Op::pointwise_bwd_jvp) + tangents(joint, Op::pointwise_fwd_jvp) == 0,
         what + ": tangents of pointwise functions are joined to them");
}

void sweeps() {
  same_sweep("steps=3", 0, 1, 1, 2);  // the first scaling and the last update stand alone
  same_sweep("steps=3 rate_grad=1", 0, 0, 1, 3);
  same_sweep("steps=3 rate_grad=1 order=1", 0, 0, 1, 1);  // the sweep ends behind the last step
  same_sweep("steps=3 weight_decay=0.1 rate_grad=1", 0, 0, 3, 3);
  same_sweep("steps=3 momentum=0.9 rate_grad=1", 0, 0, 0, 3);
  same_sweep("steps=3 momentum=0.9", 0, 3, 0, 0);
  same_sweep("steps=3 queries=1,2,3", 0, 3, 3, 0);  // a query's gradient comes between
}

// Plain descent with one rate: every layer of an MLP makes its own update, and of the sweep those whose lambda nobody reads afterwards.
void updates() {
  const Program net = with_torch_weights(Program::parse(kMlp));
  for (const bool stash : {false, true})
    for (const std::string loop : {"steps=1", "steps=3", "steps=3 order=1", "steps=3 order=0", "steps=3 queries=1,2,3"}) {
      InnerLoopSpec spec;
      spec.support_examples = 4;
      spec.query_examples = 3;
      spec.loop = InnerLoop::parse(loop);
      spec.loss_weights = spec.loop.queries.size() > 1;
      spec.stash = stash;
      spec.uniform_rate = true;
      const Schedule parts = meta_gradient_schedule(net, spec), fused = fuse_updates(parts, everything);
      const auto count = [&](Op op) {
        return int(std::count_if(fused.steps.begin(), fused.steps.end(), [op](const Step& s) { return s.op == op; }));
      };
      const int layers = int(std::count_if(net.nodes.begin(), net.nodes.end(), [](const Node& n) { return n.kind == NodeKind::linear; }));
      const std::string what = loop + (stash ? ", stash" : "") + ": ";
      report(results(parts) == results(fused), what + "joined updates have the parts' bits");
      report(count(Op::uniform_update) == 0 && count(Op::linear_update) == spec.loop.steps * layers, what + "all updates are joined");
      report(count(Op::linear_adjoint) > 0 || spec.loop.order == 0, what + "so are adjoints");
      report(to_string(fuse_updates(parts, [](Op op) { return op != Op::linear_update; })) == to_string(parts),
             what + "not without the op");
      for (const std::string& isa : available_cpu_isas()) {
        set_cpu_isa(isa);
        expect_error(what + "cpu " + isa, apart(results(parts), results(fused, cpu_ops(8))), 1e-10);
      }
      set_cpu_isa("");
    }
}

std::string block(const std::string& mode, const std::string& rest) {
  return "fastmaml 1\ninput 2 7 6\nparam 0 5 2 3 3\nparam 90 5\nparam 95 5\n" +
         std::string(mode == "frozen" ? "buffer 0 5\nbuffer 5 5\n" : "") +
         "conv2d 0 weight=0 bias=-1 stride=1,1 padding=1,1\nbatch_norm 1 weight=1 bias=2 eps=1e-3 mode=" + mode +
         (mode == "frozen" ? " mean=0 var=1" : "") + "\n" + rest;
}

void passes() {
  const std::vector<std::pair<std::string, std::string>> rests = {
      {"2x2 pool", "relu 2\nmax_pool2d 3" + kPool},
      {"leaky, 2x2 pool", "leaky_relu 2 slope=0.1\nmax_pool2d 3" + kPool},
      {"3x3 pool, overlapping and padded", "max_pool2d 2 kernel=3,3 stride=2,2 padding=1,1\nrelu 3\n"},
      {"3x2 pool, padded on one side", "max_pool2d 2 kernel=3,2 stride=1,3 padding=1,0\nleaky_relu 3 slope=0.3\n"},
      {"3x3 pool side by side", "max_pool2d 2 kernel=3,3 stride=3,3 padding=0,0\nrelu 3\n"},
  };
  for (const std::string mode : {"batch", "frozen"}) {
    for (const auto& [name, rest] : rests)
      for (bool dual : {false, true})
        same(name + ", " + mode + (dual ? ", dual" : ""), Program::parse(block(mode, rest + "output 4\nloss none\n")),
             [dual](const Program& net) { return passes_schedule(net, 3, dual); });
    same("no pool, " + mode, Program::parse(block(mode, "relu 2\noutput 3\nloss none\n")),
         [](const Program& net) { return passes_schedule(net, 3, true); });
  }
}

// Two blocks and a classifier, a norm on the bare input (no tangent, no gradient), and one parameter of two layers.
std::string network(const std::string& mode) {
  return "fastmaml 1\ninput 2 9 8\nparam 0 2\nparam 2 2\nparam 4 5 2 3 3\nparam 94 5\nparam 99 5\nparam 104 5 5 3 3\nparam 329 3 20\n"
         "batch_norm 0 weight=0 bias=1 eps=1e-3 mode=" +
         mode +
         "\nleaky_relu 1 slope=0.2\n"
         "conv2d 2 weight=2 bias=-1 stride=1,1 padding=1,1\nbatch_norm 3 weight=3 bias=4 eps=1e-3 mode=" +
         mode +
         "\nrelu 4\n"
         "max_pool2d 5 kernel=2,2 stride=2,2 padding=0,0\n"
         "conv2d 6 weight=5 bias=-1 stride=1,1 padding=1,1\nbatch_norm 7 weight=3 bias=4 eps=1e-3 mode=" +
         mode +
         "\nrelu 8\n"
         "max_pool2d 9 kernel=2,2 stride=2,2 padding=0,0\n"
         "flatten 10\nlinear 11 weight=6 bias=-1\noutput 12\nloss cross_entropy smoothing=0.1\n";
}

void networks() {
  for (const std::string mode : {"batch", "support"}) {
    const Program net = Program::parse(network(mode));
    InnerLoopSpec spec;
    spec.support_examples = 4;
    spec.query_examples = 3;
    spec.loop = InnerLoop::parse("steps=2 rate_grad=1");
    const auto meta_gradient = [&spec](const Program& n) { return meta_gradient_schedule(n, spec); };
    same("meta-gradient, low memory, " + mode, net, meta_gradient);
    spec.stash = true;
    same("meta-gradient, stash, " + mode, net, meta_gradient);
    spec.loop = InnerLoop::parse("steps=2 order=0");
    same("first order, " + mode, net, meta_gradient);
    same("forward, " + mode, net, [](const Program& n) { return forward_schedule(n, 3, 4); });
    if (mode != "batch") continue;
    same("conjugate gradients", net, [](const Program& n) { return conjugate_gradient_schedule(n, 4, false, false, 2); });
    same("hvp", net, [](const Program& n) { return hvp_schedule(n, 4, true); });
    same("vjp", net, [](const Program& n) { return vjp_schedule(n, 4); });
  }
}

void rectified_networks() {
  for (const auto& [name, text] : {std::pair<std::string, std::string>{"rectified net", kRectified}, {"rectified mlp", kRectifiedMlp}}) {
    const Program net = Program::parse(text), bare = Program::parse(text.substr(0, text.find("loss ")) + "loss none\n");
    for (bool dual : {false, true})
      same(name + (dual ? ", dual" : ", passes"), bare, [dual](const Program& n) { return passes_schedule(n, 3, dual); }, "pointwise_");
    const std::string label = name + ", ";
    const auto check = [&](const std::string& what, const std::function<Schedule(const Program&)>& schedule_of) {
      same(label + what, net, schedule_of, "pointwise_");
    };
    InnerLoopSpec spec;
    spec.support_examples = 4;
    spec.query_examples = 3;
    spec.loop = InnerLoop::parse("steps=2 rate_grad=1");
    const auto meta_gradient = [&spec](const Program& n) { return meta_gradient_schedule(n, spec); };
    check("meta-gradient, low memory", meta_gradient);
    spec.stash = true;
    check("meta-gradient, stash", meta_gradient);
    spec.loop = InnerLoop::parse("steps=2 order=0");
    check("first order", meta_gradient);
    check("forward", [](const Program& n) { return forward_schedule(n, 3, 4); });
    check("conjugate gradients", [](const Program& n) { return conjugate_gradient_schedule(n, 4, false, false, 2); });
    check("hvp", [](const Program& n) { return hvp_schedule(n, 4, true); });
    check("vjp", [](const Program& n) { return vjp_schedule(n, 4); });
  }
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  joins();
  rectifiers();
  passes();
  networks();
  rectified_networks();
  sweeps();
  updates();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
