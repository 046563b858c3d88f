// What calls share: parsed Programs and planned Schedules. All of it is thread-safe.
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

// What a call computes: all that its Schedule depends on beside the network and the backend.
struct CallSpec {
  Computation computation = Computation::forward;
  InnerLoopSpec spec;
  Memory memory = Memory::low;  // meta_gradient
  int solve_steps = 0;
  bool dual = false;                         // passes
  Curvature curvature = Curvature::hessian;  // linearise, curvature
};

// How a table that works on whole batches walks a Schedule. automatic: resident, unless that declines.
enum class Walk : uint8_t { automatic, layered, resident };
Walk walk_named(const std::string& name);  // "auto", "layered" or "resident"
void set_cuda_walk(Walk walk);             // of this process, for tests and benchmarks

// How the CPU backend lays tasks out. automatic: as the network and the numbers of examples have it.
enum class Layout : uint8_t { automatic, tasks, lanes };
Layout layout_named(const std::string& name);  // "auto", "tasks" or "lanes"
void set_cpu_layout(Layout layout);            // of this process, for tests and benchmarks; lanes: where the network runs so

// Can a plan make use of one rate for all parameters?
bool takes_uniform_rate(const OpTable& table, const InnerLoop& loop);

struct Plan {
  std::shared_ptr<const Program> program;  // as the backend runs it: fused
  const OpTable* table;                    // of the backend, for its layout
  Schedule schedule;
  Workspace workspace;
  ResidentCode resident = {};   // where the table has a resident walk
  Memory memory = Memory::low;  // of a meta-gradient: what was asked for, or what "auto" chose

  // Does a run take the resident walk of the table? Throws std::invalid_argument where that is asked for and declines.
  bool takes_resident() const;
  std::string walk() const;                                // which walk it takes, what that needs, or why not the other; a line
  bool as_torch() const;                                   // on the host, with parameters in torch's order: they are not moved
  int lanes() const { return std::max(table->lanes, 1); }  // tasks that walk side by side
  size_t arena_bytes() const { return lanes() * workspace.task_bytes + workspace.scratch_bytes; }  // one worker's
};

std::shared_ptr<const Program> program_of(const std::string& text);
std::shared_ptr<const InnerLoop> inner_loop_of(const std::string& text);
std::shared_ptr<const Plan> plan_for(const std::string& text, const OpTable& table, const CallSpec& call);

}  // namespace fastmaml
