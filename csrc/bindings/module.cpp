// All that Python can reach: torch.ops.fastmaml.* and the functions of the module fastmaml._C.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "bindings/backends.h"
#include "bindings/call_memory.h"
#include "bindings/introspection.h"
#include "bindings/operators.h"
#include "bindings/parameter_list.h"
#include "bindings/profile_rows.h"
#include "bindings/python_loss.h"
#include "bindings/result_pool.h"
#include "bindings/threads.h"
#include "cpu/isa/choose_isa.h"
#include "plan/stash_budget.h"

// T tasks, N examples, P parameters in torch's order, K inner steps, B running statistics.
// program: the text of fastmaml/program_text.py. loop: the text of meta/inner_loop.cpp.
STABLE_TORCH_LIBRARY(fastmaml, m) {
  m.def("forward(str program, str backend, Tensor params, Tensor x, Tensor? support_x, Tensor buffers) -> Tensor");
  m.def("grad(str program, str backend, Tensor params, Tensor x, Tensor y, Tensor? weights, Tensor buffers) -> (Tensor loss, Tensor grad)");
  m.def("hvp(str program, str backend, Tensor params, Tensor x, Tensor y, Tensor? weights, Tensor v, Tensor buffers) -> Tensor");
  m.def(
      "linearise(str program, str backend, bool gauss_newton, Tensor params, Tensor x, Tensor y, Tensor? weights, Tensor buffers) "
      "-> (Tensor tape, Tensor tape_index, Tensor tape_tap)");
  m.def(
      "curvature(str program, str backend, bool gauss_newton, Tensor params, Tensor x, Tensor y, Tensor? weights, Tensor tape, "
      "Tensor tape_index, Tensor tape_tap, Tensor v, Tensor buffers) -> Tensor");
  m.def("vjp(str program, str backend, Tensor params, Tensor x, Tensor dy, Tensor buffers) -> (Tensor y, Tensor grad)");
  m.def(
      "adapt(str program, str backend, Tensor params, Tensor x, Tensor y, Tensor? weights, Tensor rates, str loop, Tensor? step_rows, "
      "Tensor? lam, Tensor? mask, Tensor? state, Tensor? step_count, Tensor buffers) -> (Tensor params, Tensor losses, Tensor state)");
  m.def(
      "meta_gradient(str program, str backend, Tensor theta, Tensor support_x, Tensor support_y, Tensor? support_weights, Tensor query_x, "
      "Tensor query_y, Tensor? query_weights, Tensor? task_weights, Tensor rates, str loop, str memory, Tensor? loss_weights, "
      "Tensor? step_rows, Tensor? lam, Tensor? mask, Tensor buffers) "
      "-> (Tensor loss, Tensor grad, Tensor query_output, Tensor support_losses, Tensor rate_grad, Tensor step_rows_grad, "
      "Tensor query_losses, Tensor total_loss)");
  m.def(
      "plain_meta_gradient(str program, str backend, Tensor[] theta, Tensor support_x, Tensor support_y, Tensor query_x, Tensor query_y, "
      "float rate, str loop, str memory) "
      "-> (Tensor loss, Tensor grad, Tensor query_output, Tensor support_losses, Tensor rate_grad, Tensor step_rows_grad, "
      "Tensor query_losses, Tensor total_loss)");
  m.def(
      "solve(str program, str backend, Tensor params, Tensor x, Tensor y, Tensor? weights, Tensor v, Tensor? mask, float lam, int steps, "
      "float damping, float stop, Tensor buffers) -> (Tensor solution, Tensor history, Tensor state)");
  m.def(
      "passes(str program, str backend, bool dual, Tensor params, Tensor params_dot, Tensor x, Tensor x_dot, Tensor dy, Tensor dy_dot, "
      "Tensor buffers) -> (Tensor y, Tensor y_dot, Tensor dx, Tensor dx_dot, Tensor dparams, Tensor dparams_dot)");
  m.def("scaled_parts(Tensor flat, Tensor scale, int[] shapes) -> Tensor[]");
}

// The CPU and CUDA registrations are the same: the arrays' device selects the executor.
template <class Library>
void implement(Library& m) {
  m.impl("forward", TORCH_BOX(&fastmaml::forward_call));
  m.impl("grad", TORCH_BOX(&fastmaml::grad_call));
  m.impl("vjp", TORCH_BOX(&fastmaml::vjp_call));
  m.impl("hvp", TORCH_BOX(&fastmaml::hvp_call));
  m.impl("linearise", TORCH_BOX(&fastmaml::linearise_call));
  m.impl("curvature", TORCH_BOX(&fastmaml::curvature_call));
  m.impl("adapt", TORCH_BOX(&fastmaml::adapt_call));
  m.impl("meta_gradient", TORCH_BOX(&fastmaml::meta_gradient_call));
  m.impl("solve", TORCH_BOX(&fastmaml::solve_call));
  m.impl("passes", TORCH_BOX(&fastmaml::passes_call));
}
STABLE_TORCH_LIBRARY_IMPL(fastmaml, CPU, m) {
  implement(m);
  m.impl("plain_meta_gradient", TORCH_BOX(&fastmaml::plain_meta_gradient_call));
  m.impl("scaled_parts", TORCH_BOX(&fastmaml::scaled_parts_call));
}
STABLE_TORCH_LIBRARY_IMPL(fastmaml, CUDA, m) { implement(m); }

namespace {

using namespace fastmaml;

// Applies kOf to the plan of these arguments (plan_asked_for).
template <auto kOf, class... A>
auto planned(std::shared_ptr<const Plan> (*make)(A...)) {
  return [make](A... arguments) { return kOf(*make(arguments...)); };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace pybind11::literals;
  m.doc() = "The compiled engine. Importing it registers torch.ops.fastmaml.*; engine.py is its only caller.";

  m.def(
      "describe", [](const std::string& program) { return to_string(*program_of(program)); }, "program"_a,
      "The network before a backend fuses its layers, a line per value.");
  m.def("vocabulary", &vocabulary,
        "The words the engine knows: ops, rules; and rectifiers, smooth (pointwise functions) and losses, each with the key of the one\n"
        "number that may follow it in a program's text.");
  m.def("output_shape", &output_shape, "program"_a, "The output of one example, in torch's order.");
  m.def("tape_sizes", &tape_sizes_of, "program"_a, "backend"_a, "gauss_newton"_a, "real_bytes"_a, "examples"_a, "weights"_a,
        "What linearise leaves of a task: elements of (tape, tape_index, tape_tap).");
  m.def("loop_sizes", &loop_sizes, "program"_a, "loop"_a, "What the shapes of adapt's and meta_gradient's results depend on.");
  m.def("set_python_loss", &set_python_loss, "loss"_a,
        "This thread's function for programs with `loss caller`, or None. loss(query, first_row, z, z_dot, loss_out, dz_out) fills the\n"
        "last two in place: z, z_dot, dz_out [T, N, *output], loss_out [T]; z_dot is None for the loss, loss_out for its tangent.");
  const auto def_planned = [&](const char* name, const auto& function, const char* doc) {
    m.def(name, function, "program"_a, "kind"_a, "backend"_a = "cpu", "real_bytes"_a = 4, "support_examples"_a = 1, "query_examples"_a = 1,
          "loop"_a = "steps=1", "memory"_a = "low", "solve_steps"_a = 1, "uniform_rate"_a = false, doc);
  };
  def_planned("steps", planned<steps_of>(&plan_asked_for), "The Schedule of one computation, a line per Step.");
  def_planned("arena_bytes", planned<arena_bytes_of>(&plan_asked_for),
              "The memory that one task in flight takes, or a group of tasks side by side, in bytes.");
  def_planned("lanes", planned<lanes_of>(&plan_asked_for), "How many tasks walk that Schedule side by side.");
  def_planned("walk", planned<walk_of>(&plan_asked_for),
              "How the backend walks that Schedule, what it takes of a task's memory there, and why no other way.");
  m.def(
      "set_cuda_walk", [](const std::string& walk) { set_cuda_walk(walk_named(walk)); }, "walk"_a,
      "Which walk the CUDA backends take from now on: \"layered\", \"resident\" (raises where it declines), or \"auto\".");

  m.def(
      "set_cpu_layout", [](const std::string& layout) { set_cpu_layout(layout_named(layout)); }, "layout"_a,
      "How the CPU backend lays tasks out from now on: \"tasks\" one after the other, \"lanes\" side by side where the network runs so,\n"
      "or \"auto\".");
  def_planned(
      "costs", planned<cost_rows>(&plan_asked_for),
      "What that Schedule costs a task on paper: memory (\"stash\" or \"low\"), lanes (tasks side by side), arena_bytes, and steps, a\n"
      "dict each: phase, op, layer, examples, sizes (of its loops), products and other (floating-point operations), bytes.");
  m.def(
      "stash_budget", [](const std::string& backend, bool at_once) { return stash_budget(table_named(backend, sizeof(float)), at_once); },
      "backend"_a, "python_loss"_a = false,
      "The largest arena with which memory=\"auto\" keeps the activations of the inner steps, in bytes.");
  m.def("machine_memory", &machine_memory, "Bytes of memory that this process may have.");
  m.def("profile_start", &start_profile, "From now on every Step of every call on a backend of the host is timed.");
  m.def(
      "profile_stop", &profile_rows,
      "Ends that. For each plan that ran what costs() says, and walks, tasks, workers, wall_seconds (of the walks); for each Step calls,\n"
      "seconds (summed over the workers) and least_seconds (of the fastest call). Costs are a task's, times are all tasks'.");

  m.def("allocations", [] { return memory_held().allocations; }, "How often the memory held between calls was allocated or grown.");
  m.def("high_water", [] { return memory_held().high_water; }, "Bytes of the largest arena that one worker has needed so far.");
  m.def(
      "release_memory",
      [] {
        forget_recordings();
        release_memory();
        release_results();
      },
      "Gives the memory held between calls back to the system.");

  m.def("load_cuda", &load_cuda, "path"_a, "Loads the CUDA backend's library.");
  m.def("cuda_loaded", &cuda_loaded, "Whether load_cuda has loaded it.");
  m.def("try_cuda", &try_cuda, "Launches a kernel that does nothing; raises where this machine cannot.");
  m.def("set_recording", &set_recording, "on"_a, "Whether calls on devices are recorded and replayed; on from the start.");
  m.def("recordings", [] { return std::pair(recording_counts().held, recording_counts().replays); }, "(recordings held, replays so far).");

  m.def("cpu_isa", &cpu_isa, "The instruction set that the cpu backend runs on.");
  m.def("set_cpu_isa", &set_cpu_isa, "name"_a, "Chooses one of available_isas(); \"\" restores the widest.");
  m.def("available_isas", &available_cpu_isas, "The instruction sets that this machine can run, narrowest first.");
  m.def("thread_count", &thread_count, "torch.get_num_threads(), as the engine sees it.");
  m.def("threads_seen", &threads_seen, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "How many threads took part in one parallel loop.");

#ifdef __linux__
  m.def("emulated_kernels", &emulated_kernels, "Every kernel of the emulated CUDA backend by nvcc's symbol: (launches, readable name).");
#endif
}
