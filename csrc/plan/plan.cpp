#include "plan/plan.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "plan/fuse.h"
#include "plan/named.h"
#include "plan/rewrite.h"
#include "plan/stash_budget.h"
#include "program/param_layout.h"

namespace fastmaml {
namespace {

constexpr size_t kCached = 64;  // a plan of 100 inner steps of Conv4 holds megabytes of Steps

// Values by key. A full cache is emptied: a program with so many plans seldom repeats one.
template <class Value>
class Cache {
 public:
  template <class Make>
  std::shared_ptr<const Value> get(const std::string& key, const Make& make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = values_.find(key);
      if (found != values_.end()) return found->second;
    }
    auto made = std::make_shared<const Value>(make());
    const std::lock_guard<std::mutex> lock(mutex_);
    if (values_.size() >= kCached) values_.clear();
    return values_.emplace(key, std::move(made)).first->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const Value>> values_;
};

std::atomic<Layout> forced_layout{Layout::automatic};
std::atomic<Walk> forced_walk{Walk::automatic};

std::string key_of(const std::string& text, const OpTable& table, const CallSpec& call) {
  const InnerLoopSpec& spec = call.spec;
  const int64_t numbers[] = {
      int64_t(reinterpret_cast<uintptr_t>(&table)),  // backend, type and instruction set each have their own table
      int64_t(call.computation),
      int64_t(call.memory),
      call.solve_steps,
      call.dual,
      int64_t(call.curvature),
      spec.support_examples,
      spec.query_examples,
      spec.rates_per_step,
      spec.uniform_rate,
      spec.support_weights,
      spec.query_weights,
      spec.loss_weights,
      spec.mask,
      spec.state,
      spec.step_count,
      table.resident ? int64_t(table.resident->fast_bytes()) : 0,  // differs between devices
      int64_t(forced_layout.load()),
  };
  return std::string(reinterpret_cast<const char*>(numbers), sizeof numbers) + spec.loop.text + '\n' + text;
}

Schedule schedule_of(const Program& net, const CallSpec& call) {
  const InnerLoopSpec& spec = call.spec;
  switch (call.computation) {
    case Computation::forward:
      return forward_schedule(net, spec.query_examples, spec.support_examples);
    case Computation::gradient:
      return gradient_schedule(net, spec.support_examples, spec.support_weights);
    case Computation::vjp:
      return vjp_schedule(net, spec.support_examples);
    case Computation::hvp:
      return hvp_schedule(net, spec.support_examples, spec.support_weights);
    case Computation::adapt:
      return adapt_schedule(net, spec);
    case Computation::meta_gradient:
      return meta_gradient_schedule(net, spec);
    case Computation::solve:
      return conjugate_gradient_schedule(net, spec.support_examples, spec.support_weights, spec.mask, call.solve_steps);
    case Computation::passes:
      return passes_schedule(net, spec.support_examples, call.dual);
    case Computation::linearise:
      return curvature_schedules(net, spec.support_examples, spec.support_weights, call.curvature).first;
    case Computation::curvature:
      return curvature_schedules(net, spec.support_examples, spec.support_weights, call.curvature).second;
  }
  throw std::logic_error("a computation without a schedule");
}

// Is this one of the two parts of a split Schedule?
bool is_part(Computation c) { return c == Computation::linearise || c == Computation::curvature; }

// The backend's fastest table for the network and the numbers of examples. The choice must depend on nothing else.
const OpTable& best_layout(const OpTable& table, const Program& net, const InnerLoopSpec& spec) {
  const Layout layout = forced_layout;
  if (!table.in_lanes || layout == Layout::tasks || !table.in_lanes->run(net)) return table;
  const bool pays_off = layout == Layout::lanes || table.in_lanes->pays_off(net, std::max(spec.support_examples, spec.query_examples));
  return pays_off ? *table.in_lanes->table : table;
}

Plan make_plan(const std::string& text, const OpTable& backend, CallSpec call) {
  Plan plan{program_of(text), nullptr, {}, {}};
  const OpTable& table = best_layout(backend, *plan.program, call.spec);
  plan.table = &table;
  const auto supports = [&](Op op) { return table.supports(op); };
  call.spec.stash = call.memory != Memory::low;
  plan.memory = call.spec.stash ? Memory::stash : Memory::low;
  const auto write = [&] {
    plan.schedule = rewritten(schedule_of(*plan.program, call), table);
    plan.workspace = plan_workspace(plan.schedule, table);
  };
  if (is_part(call.computation)) {
    plan.resident.refusal = "linearise and curvature share a tape, so both take the layered walk";
  } else if (table.resident) {
    write();
    plan.resident = table.resident->encode(plan.schedule, table.resident->fast_bytes());
  }
  if (!table.resident || !plan.resident.refusal.empty()) {  // fused layers save memory traffic; a resident walk has none to save
    plan.program = std::make_shared<const Program>(fuse(*plan.program, {supports, table.rectifies, table.out_in}));
    write();
  }
  if (call.memory == Memory::automatic && plan.arena_bytes() > stash_budget(table, plan.program->loss.kind == Loss::Kind::caller)) {
    call.memory = Memory::low;
    return make_plan(text, backend, call);
  }
  if (call.memory == Memory::automatic && !plan.resident.refusal.empty()) {  // perhaps only the activations do not fit
    call.memory = Memory::low;
    Plan low = make_plan(text, backend, call);
    if (low.resident.refusal.empty()) return low;
  }
  return plan;
}

}  // namespace

Computation computation_named(const std::string& name) {
  return named<Computation>("kind", name,
                            {{"forward", Computation::forward},
                             {"grad", Computation::gradient},
                             {"vjp", Computation::vjp},
                             {"hvp", Computation::hvp},
                             {"adapt", Computation::adapt},
                             {"meta_gradient", Computation::meta_gradient},
                             {"solve", Computation::solve},
                             {"passes", Computation::passes},
                             {"linearise", Computation::linearise},
                             {"curvature", Computation::curvature}});
}

Memory memory_named(const std::string& name) {
  return named<Memory>("memory", name, {{"low", Memory::low}, {"stash", Memory::stash}, {"auto", Memory::automatic}});
}

Walk walk_named(const std::string& name) {
  return named<Walk>("walk", name, {{"auto", Walk::automatic}, {"layered", Walk::layered}, {"resident", Walk::resident}});
}

Layout layout_named(const std::string& name) {
  return named<Layout>("layout", name, {{"auto", Layout::automatic}, {"tasks", Layout::tasks}, {"lanes", Layout::lanes}});
}

void set_cpu_layout(Layout layout) { forced_layout = layout; }

void set_cuda_walk(Walk walk) { forced_walk = walk; }

bool takes_uniform_rate(const OpTable& table, const InnerLoop& loop) { return loop.plain() && table.supports(Op::uniform_update); }

bool Plan::takes_resident() const {
  if (!table->resident || forced_walk == Walk::layered) return false;
  if (forced_walk == Walk::resident && !resident.refusal.empty()) throw std::invalid_argument("no resident walk: " + resident.refusal);
  return resident.refusal.empty();
}

bool Plan::as_torch() const { return !table->device && in_torch_order(program->params); }

std::string Plan::walk() const {
  if (!table->device && program->loss.kind == Loss::Kind::caller) return "segments";
  if (!table->device && lanes() > 1) return "resident: a host thread for each group of " + std::to_string(lanes()) + " tasks in lanes";
  if (!table->device) return "resident: a host thread for each task";
  if (!table->resident) return "layered";
  if (!takes_resident()) return "layered" + (resident.refusal.empty() ? std::string() : ": " + resident.refusal);
  return "resident: " + std::to_string(resident.threads) + " threads, " + std::to_string(resident.shared_bytes) +
         " bytes of shared memory and " + std::to_string(resident.arena_bytes) + " of device memory for each task";
}

std::shared_ptr<const Program> program_of(const std::string& text) {
  static Cache<Program> cache;
  return cache.get(text, [&] { return Program::parse(text); });
}

std::shared_ptr<const InnerLoop> inner_loop_of(const std::string& text) {
  static Cache<InnerLoop> cache;
  return cache.get(text, [&] { return InnerLoop::parse(text); });
}

std::shared_ptr<const Plan> plan_for(const std::string& text, const OpTable& table, const CallSpec& call) {
  static Cache<Plan> cache;
  return cache.get(key_of(text, table, call), [&] { return make_plan(text, table, call); });
}

}  // namespace fastmaml
