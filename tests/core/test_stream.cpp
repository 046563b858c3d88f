// Whether stream() makes gradients a few images at a time, and whether that changes anything but the order of sums: on the reference.
#include <cstdio>
#include <functional>
#include <string>

#include "plan/fuse.h"
#include "plan/stream.h"
#include "same_numbers.h"

namespace fastmaml {
namespace {

// Two blocks and a classifier, a bias in front of a norm, a layer with a stride, and filters that two layers share.
std::string network(const std::string& mode) {
  const std::string norm = " eps=1e-3 mode=" + mode + "\n";
  return "fastmaml 1\ninput 2 9 8\nparam 0 2 2 3 3\nparam 36 2\nparam 38 2\nparam 40 2\nparam 42 3 8\n"
         "conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1\nbatch_norm 1 weight=2 bias=3" +
         norm +
         "relu 2\nmax_pool2d 3 kernel=2,2 stride=2,2 padding=0,0\n"
         "conv2d 4 weight=0 bias=1 stride=1,1 padding=1,1\nbatch_norm 5 weight=2 bias=3" +
         norm + "relu 6\nconv2d 7 weight=0 bias=1 stride=2,2 padding=1,1\nbatch_norm 8 weight=-1 bias=-1" + norm +
         "leaky_relu 9 slope=0.1\navg_pool2d 10 kernel=1,1 stride=1,1 padding=0,0 count_include_pad=1\nflatten 11\n"
         "linear 12 weight=4 bias=-1\noutput 13\nloss cross_entropy smoothing=0.1\n";
}

int count(const std::string& text, const std::string& part) {
  int n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

// `streamed`: how many gradients of the schedule are made in parts.
void same(const std::string& what, const Schedule& whole, bool streams) {
  const int64_t image = 9 * 8 * 2;
  const Results want = results(whole);
  for (int64_t images : {1, 2, 3}) {
    const Schedule parts = stream(whole, {0, images * image});
    const double worst = apart(want, results(parts));
    char text[80];
    std::snprintf(text, sizeof text, "%.1e of the largest, %zu Steps of %zu", worst, parts.steps.size(), whole.steps.size());
    report(worst <= 1e-12, what + ", " + std::to_string(images) + " images", text);
    report((parts.steps.size() > whole.steps.size()) == streams, what + (streams ? ": is streamed" : ": is not streamed"));
  }
  report(to_string(stream(whole, {100 * image, image})) == to_string(whole), what + ": what fits stays");
}

void networks() {
  const auto everything = [](Op) { return true; };
  for (const std::string mode : {"batch", "support"}) {
    const Program net = fuse(Program::parse(network(mode)), {everything, false});
    InnerLoopSpec spec;
    spec.support_examples = 4;
    spec.query_examples = 5;
    for (const std::string loop : {"steps=2 rate_grad=1", "steps=2 order=0"})
      for (bool stash : {false, true}) {
        spec.loop = InnerLoop::parse(loop);
        spec.stash = stash;
        same("meta-gradient " + loop + (stash ? ", stash, " : ", low memory, ") + mode, meta_gradient_schedule(net, spec), true);
      }
    if (mode != "batch") continue;
    same("hvp", hvp_schedule(net, 4, true), true);
    same("vjp", vjp_schedule(net, 5), true);
    same("conjugate gradients", conjugate_gradient_schedule(net, 4, false, false, 2), true);
    same("passes", passes_schedule(net, 5, true), true);
    same("forward", forward_schedule(net, 5, 0), false);
  }
}

// Gradients of images of two sizes that wait for nothing of each other: each is streamed alone, in a slot of its own size.
void branches() {
  const Program net = Program::parse(
      "fastmaml 1\ninput 2 8 8\nparam 0 2 2 3 3\nparam 36 2 2 3 3\nparam 72 3 32\n"
      "conv2d 0 weight=0 bias=-1 stride=1,1 padding=1,1\nconv2d 0 weight=1 bias=-1 stride=2,2 padding=1,1\n"
      "batch_norm 1 weight=-1 bias=-1 eps=1e-3 mode=batch\nrelu 3\nmax_pool2d 4 kernel=2,2 stride=2,2 padding=0,0\n"
      "batch_norm 2 weight=-1 bias=-1 eps=1e-3 mode=batch\nrelu 6\nadd 5,7\nflatten 8\nlinear 9 weight=2 bias=-1\n"
      "output 10\nloss cross_entropy smoothing=0.1\n");
  const Schedule whole = gradient_schedule(fuse(net, {[](Op) { return true; }, false}), 4, false);
  const Schedule parts = stream(whole, {0, 4 * 4 * 2});
  bool fits = true;
  for (const Step& step : parts.steps) {
    if (step.op != Op::norm_pool_act_bwd_data) continue;
    const Pool2d& pool = std::get<NormPoolAct>(parts.layers[step.layer]).pool;
    fits = fits && step.operand[0].offset + step.examples * pool.H * pool.W * pool.C <= parts.slots[step.operand[0].slot].size;
  }
  report(fits, "branches: every gradient fits its slot");
  report(apart(results(whole), results(parts)) <= 1e-12 && parts.steps.size() > whole.steps.size(), "branches: the same numbers");
}

// The gradient by the first layer's output is all that a chunk holds of it.
void memory() {
  const Program net = fuse(Program::parse(network("batch")), {[](Op) { return true; }, false});
  const Schedule whole = gradient_schedule(net, 40, false), parts = stream(whole, {0, 9 * 8 * 2});
  const size_t before = plan_workspace(whole, reference_ops()).task_bytes, after = plan_workspace(parts, reference_ops()).task_bytes;
  report(after < before, "memory", std::to_string(before) + " bytes, streamed " + std::to_string(after));
  report(count(to_string(parts), "norm_pool_act_bwd_data N=1 ") >= 40, "an image at a time");
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  networks();
  branches();
  memory();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
