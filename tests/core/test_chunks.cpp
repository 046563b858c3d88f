// Whether chunk_examples() takes many examples a few at a time where it should, and whether that changes anything but the order of sums: on
// the reference.
#include <cstdio>
#include <string>

#include "plan/chunks.h"
#include "plan/fuse.h"
#include "same_numbers.h"

namespace fastmaml {
namespace {

constexpr int64_t kMany = 410, kCached = 8000;  // examples, and numbers that all of them exceed

bool everything(Op) { return true; }

// A classifier, with biases here and there.
const char* const kClassifier =
    "fastmaml 1\ninput 3\nparam 0 9 3\nparam 27 9\nparam 36 3 9\nlinear 0 weight=0 bias=1\nsilu 1\nlinear 2 weight=2 bias=-1\n"
    "output 3\nloss cross_entropy smoothing=0.1\n";

void same(const std::string& what, const Schedule& whole, bool chunked) {
  const Schedule parts = chunk_examples(whole, {kCached});
  const double worst = apart(results(whole), results(parts));
  char text[80];
  std::snprintf(text, sizeof text, "%.1e of the largest, %zu Steps of %zu", worst, parts.steps.size(), whole.steps.size());
  report(worst <= 1e-12, what, text);
  report((parts.steps.size() > whole.steps.size()) == chunked, what + (chunked ? ": in chunks" : ": as it is"));
  report(to_string(chunk_examples(whole, {int64_t(1) << 40})) == to_string(whole), what + ": what fits stays");
}

void schedules() {
  for (const auto& [name, text] : {std::pair{"mlp", kMlp}, {"rectified", kRectifiedMlp}, {"classifier", kClassifier}}) {
    const Program net = fuse(Program::parse(text), {everything, true});
    const auto named = [&, name = std::string(name)](const std::string& what) { return name + ", " + what; };
    same(named("gradient"), fuse(gradient_schedule(net, kMany, true), everything), true);
    same(named("hvp"), fuse(hvp_schedule(net, kMany, true), everything), true);
    same(named("hvp of parts"), hvp_schedule(net, kMany, true), true);
    same(named("vjp"), vjp_schedule(net, kMany), true);
    same(named("few examples"), hvp_schedule(net, 8, true), false);
    for (const Curvature curvature : {Curvature::hessian, Curvature::gauss_newton}) {
      const SplitSchedule parts = curvature_schedules(net, kMany, true, curvature);
      same(named("what products share"), parts.first, true);
      same(named("product"), fuse(parts.second, everything), true);
    }
    InnerLoopSpec spec;
    spec.support_examples = spec.query_examples = kMany;
    spec.support_weights = spec.query_weights = true;
    spec.loop = InnerLoop::parse("steps=2 rate_grad=1");
    for (const bool stash : {false, true}) {
      spec.stash = stash;
      same(named(stash ? "meta-gradient, stash" : "meta-gradient"), meta_gradient_schedule(net, spec), true);
    }
  }
}

// What only a run's own Steps see has room for a chunk.
void memory() {
  const Schedule whole = hvp_schedule(Program::parse(kMlp), 4000, true), parts = chunk_examples(whole, {kCached});
  const size_t before = plan_workspace(whole, reference_ops()).task_bytes, after = plan_workspace(parts, reference_ops()).task_bytes;
  report(after * 10 < before, "memory", std::to_string(before) + " bytes, in chunks " + std::to_string(after));
}

// A wide layer's weights would pass through the cache once for each chunk.
void wide() {
  const Program net = Program::parse(
      "fastmaml 1\ninput 40\nparam 0 40 40\nparam 1600 2 40\nlinear 0 weight=0 bias=-1\ntanh 1\nlinear 2 weight=1 bias=-1\n"
      "output 3\nloss mse\n");
  same("wide layers", hvp_schedule(net, kMany, true), false);
}

}  // namespace
}  // namespace fastmaml

int main() {
  using namespace fastmaml;
  schedules();
  memory();
  wide();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
