// The data that calls share: parsed Programs and planned Schedules. All of it is thread-safe.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "meta/meta.h"
#include "ops/ops.h"

namespace fastmaml {

enum class Computation : uint8_t { forward, gradient, vjp, hvp, adapt, meta_gradient, solve, passes, linearise, curvature };
enum class Memory : uint8_t { low, stash, automatic };

Computation computation_named(const std::string& name);
Memory memory_named(const std::string& name);  // "low", "stash" or "auto"

// A call's computation: all that its Schedule depends on, except the network and the backend.
struct CallSpec {
  Computation computation = Computation::forward;
  InnerLoopSpec spec;
  Memory memory = Memory::low;  // meta_gradient
  int solve_steps = 0;
  bool dual = false;                         // passes
  Curvature curvature = Curvature::hessian;  // linearise, curvature
};

// How a device walks a Schedule. automatic: resident if possible, else layered.
enum class Walk : uint8_t { automatic, layered, resident };
Walk walk_named(const std::string& name);  // "auto", "layered" or "resident"
void set_cuda_walk(Walk walk);             // for the whole process, for tests and benchmarks

// How the CPU backend lays out tasks. automatic: chosen by the network and the numbers of examples.
enum class Layout : uint8_t { automatic, tasks, lanes };
Layout layout_named(const std::string& name);  // "auto", "tasks" or "lanes"
void set_cpu_layout(Layout layout);            // for the whole process, for tests and benchmarks; lanes: if the network supports them

// Can a plan use one rate for all parameters?
bool takes_uniform_rate(const OpTable& table, const InnerLoop& loop);

struct Plan {
  std::shared_ptr<const Program> program;  // fused, as the backend runs it
  const OpTable* table;                    // the backend's table for this layout
  Schedule schedule;
  Workspace workspace;
  ResidentCode resident = {};   // if the table has a resident walk
  Memory memory = Memory::low;  // for a meta-gradient: as requested, or as chosen by "auto"

  // Does a run take the table's resident walk? Throws std::invalid_argument if that walk was forced and is impossible.
  bool takes_resident() const;
  std::string walk() const;                                // one line: the chosen walk, its memory, and why the other one is impossible
  bool as_torch() const;                                   // on the host, with parameters in torch's order, which need no reordering
  int lanes() const { return std::max(table->lanes, 1); }  // tasks that walk side by side
  size_t arena_bytes() const { return lanes() * workspace.task_bytes + workspace.scratch_bytes; }  // for one worker
};

std::shared_ptr<const Program> program_of(const std::string& text);
std::shared_ptr<const InnerLoop> inner_loop_of(const std::string& text);
std::shared_ptr<const Plan> plan_for(const std::string& text, const OpTable& table, const CallSpec& call);

}  // namespace fastmaml
