#include "bindings/introspection.h"

#include <pybind11/stl.h>

#include "bindings/backends.h"
#include "bindings/tape_sizes.h"
#ifdef __linux__
#include "cuda/emulated/emu.h"
#endif
#include "meta/step_rows.h"
#include "program/param_layout.h"

namespace fastmaml {

std::shared_ptr<const Plan> plan_asked_for(const std::string& program, const std::string& kind, const std::string& backend,
                                           int64_t real_bytes, int64_t support_examples, int64_t query_examples, const std::string& loop,
                                           const std::string& memory, int solve_steps, bool uniform_rate) {
  const OpTable& table = table_named(backend, size_t(real_bytes));
  CallSpec call;
  call.computation = computation_named(kind);
  call.spec.loop = InnerLoop::parse(loop);
  call.spec.support_examples = support_examples;
  call.spec.query_examples = query_examples;
  call.spec.loss_weights = call.spec.loop.queries.size() > 1;
  call.spec.uniform_rate = uniform_rate && takes_uniform_rate(table, call.spec.loop);
  call.solve_steps = solve_steps;
  call.memory = call.computation == Computation::meta_gradient ? memory_named(memory) : Memory::low;
  return plan_for(program, table, call);
}

std::string steps_of(const Plan& plan) { return to_string(plan.schedule); }
size_t arena_bytes_of(const Plan& plan) { return plan.arena_bytes(); }
int lanes_of(const Plan& plan) { return plan.lanes(); }
std::string walk_of(const Plan& plan) { return plan.walk(); }

pybind11::dict loop_sizes(const std::string& program, const std::string& text) {
  const InnerLoop loop = InnerLoop::parse(text);
  pybind11::dict sizes;
  sizes["steps"] = loop.steps;
  sizes["states"] = loop.states();
  sizes["queries"] = loop.queries.size();
  sizes["step_row"] = size_of(step_row_params(*program_of(program), loop));
  sizes["per_task"] = loop.per_task;
  sizes["rate_grad"] = loop.rate_grad;
  return sizes;
}

std::tuple<int64_t, int64_t, int64_t> tape_sizes_of(const std::string& program, const std::string& backend, bool gauss_newton,
                                                    int64_t real_bytes, int64_t examples, bool weights) {
  CallSpec call;
  call.computation = Computation::linearise;
  call.curvature = gauss_newton ? Curvature::gauss_newton : Curvature::hessian;
  call.spec.support_examples = examples;
  call.spec.support_weights = weights;
  const TapeSizes sizes = tape_sizes(plan_for(program, table_named(backend, size_t(real_bytes)), call)->schedule);
  return {sizes.real, sizes.index, sizes.tap};
}

std::vector<int64_t> output_shape(const std::string& text) {
  const Shape shape = program_of(text)->output_shape();
  return shape.image ? std::vector<int64_t>{shape.C, shape.H, shape.W} : std::vector<int64_t>{shape.C};
}

pybind11::dict vocabulary() {
  using namespace pybind11::literals;
  pybind11::list ops, rules;
#define X(name, ...) ops.append(#name);
  FASTMAML_ALL_OPS(X)
#undef X
#define X(name, ...) rules.append(#name);
  FASTMAML_RULES(X)
#undef X
  pybind11::dict rectifiers, smooth, losses;
#define X(name, key) rectifiers[#name] = key;
  FASTMAML_RECTIFIERS(X)
#undef X
#define X(name, key) smooth[#name] = key;
  FASTMAML_SMOOTH(X)
#undef X
#define X(name, key, target) losses[#name] = key;
  FASTMAML_LOSSES(X)
#undef X
  return pybind11::dict("ops"_a = ops, "rectifiers"_a = rectifiers, "smooth"_a = smooth, "losses"_a = losses, "rules"_a = rules);
}

#ifdef __linux__
std::map<std::string, std::pair<int64_t, std::string>> emulated_kernels() {
  std::map<std::string, emu::Kernel> ran = emu::kernels();
  std::map<std::string, std::pair<int64_t, std::string>> all;
  for (const std::string& kernel : emu::compiled_kernels()) all[kernel] = {ran[kernel].launches, emu::readable(kernel)};
  return all;
}
#endif

}  // namespace fastmaml
