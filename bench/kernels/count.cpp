// Counts what a meta-gradient asks of a GPU, on the emulated CUDA table and by the engine's own plans: launches for all tasks, announced
// and not run; and the bytes of global memory that the kernels request, of one task that really runs (race build). A task's bytes do not
// depend on the batch. Layered, every inner step asks for the same, but that the first one's adjoint is fused with the next: two
// inner steps of one task stand for all. Resident, a task runs whole.
//   count PROGRAM_FILE support=5 query=75 tasks=32 steps=1,5 precision=float32        writes JSON; workloads.py is its caller
// With memory "low", and with "stash" where the engine's "auto" takes that.
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "cuda/choose.h"
#include "cuda/cuda_tables.h"
#include "cuda_op_runs.h"
#include "meta/meta.h"
#include "networks.h"
#include "plan/plan.h"

namespace fastmaml {
namespace {

constexpr uintptr_t kAnnounce = 0, kRun = 1;  // the stream tells the functions of the counting table which

// ---------------------------------------------------------------- a Step, and what it must do

// The same for all Steps that ask for the same.
std::string key_of(const Call& call) {
  std::string present;
  const std::vector<Role> role = roles(call.step.op);
  for (size_t k = 0; k < role.size(); ++k)
    if (role[k].optional && !call[int(k)]) present += " -" + std::string(role[k].name);
  const Case c{call.step.op, call.layer, call.step.examples, 1, call.step.stat_examples};
  std::string key = name_of(c, 4, present);
  key.erase(key.find(" float32"), 8);
  key.erase(key.find(", 1 tasks,"), 10);
  return key;
}

// ---------------------------------------------------------------- what is found out

struct Bytes {
  int64_t read = 0, written = 0;
};
struct Asked {  // by one Step
  std::string op;
  int64_t flops = 0, compulsory = 0;    // of a task
  int64_t times = 0;                    // Steps that ask for the same
  std::map<std::string, Bytes> bytes;   // of a task, by kernel
  std::vector<emu::Launched> launches;  // for all tasks
};

std::map<std::string, Asked> asked;
const OpTable* table = nullptr;

// A function of the table that stands in for op's.
template <int op>
void counted(const Call& call) {
  Asked& step = asked[key_of(call)];
  const bool first = step.times++ == 0;
  step.op = op_name(static_cast<Op>(op));
  const Cost cost = cost_of(call.step, call.layer, sizeof(float));
  step.flops = int64_t(cost.products);
  step.compulsory = int64_t(cost.bytes);
  const auto see = [&](const emu::Launched& launched) {
    if (first) step.launches.push_back(launched);
  };
  emu::listen(see, call.stream == kRun);
  table->run[op](call);
  emu::listen({});
}

template <int... op>
OpTable counting(const OpTable& of, std::integer_sequence<int, op...>) {
  table = &of;
  OpTable copy = of;
  ((copy.run[op] = of.run[op] ? counted<op> : nullptr), ...);
  return copy;
}

// What the Schedule of a meta-gradient asks for; with run, its kernels run.
std::map<std::string, Asked> walk(const Plan& plan, int64_t tasks, int64_t classes, bool run) {
  const OpTable counting_table = counting(*plan.table, std::make_integer_sequence<int, kOps>());
  Arguments<float> arguments(plan.schedule, tasks, classes);
  Arenas arenas;
  asked.clear();
  run_layered({counting_table, plan.schedule, plan.workspace, arguments.views, tasks, 1, run ? kRun : kAnnounce}, arenas);
  return asked;
}

// The one launch of the resident walk, with the bytes that it asks for where it runs.
emu::Launched resident(const Plan& plan, int64_t tasks, int64_t classes, bool run) {
  const ResidentCode& code = plan.resident;
  Arguments<float> arguments(plan.schedule, tasks, classes);
  void* const steps = emu::allocate(code.steps.size());
  std::memcpy(steps, code.steps.data(), code.steps.size());
  void* const arena = emu::allocate(code.arena_bytes * size_t(tasks));
  emu::Launched launched;
  emu::listen([&](const emu::Launched& l) { launched = l; }, run);
  plan.table->resident->launch(code, steps, arguments.views, arena, tasks, 0);
  emu::listen({});
  emu::free(arena);
  emu::free(steps);
  return launched;
}

// Each ends with a barrier.
int stages_of(const ResidentCode& code) {
  const auto* steps = reinterpret_cast<const cuda_emulated::ResidentStep*>(code.steps.data());
  int stages = 0;
  for (int first = 0; first < code.count; first += steps[first].stage) ++stages;
  return stages;
}

// A task's arguments and results, once.
int64_t argument_bytes(const Schedule& schedule) {
  int64_t bytes = 0;
  for (const Slot& slot : schedule.slots)
    if (slot.arg != Arg::none) bytes += slot.size * int64_t(element_bytes(slot.type, sizeof(float)));
  return bytes;
}

// ---------------------------------------------------------------- writing

void write(std::ostream& out, const std::string& name, const Asked& step, const Asked& of_one_task) {
  out << "{\"name\": \"" << name << "\", \"op\": \"" << step.op << "\", \"times\": " << step.times << ", \"flops\": " << step.flops
      << ", \"compulsory\": " << step.compulsory << ", \"launches\": [";
  const char* comma = "";
  for (const emu::Launched& l : step.launches) {
    out << comma << "{\"kernel\": \"" << l.kernel << "\", \"blocks\": " << l.blocks << ", \"threads\": " << l.threads
        << ", \"shared\": " << l.shared_bytes << "}";
    comma = ", ";
  }
  std::map<std::string, Bytes> bytes;
  for (const emu::Launched& l : of_one_task.launches) {
    bytes[l.kernel].read += l.bytes_read;
    bytes[l.kernel].written += l.bytes_written;
  }
  out << "], \"bytes\": {";
  comma = "";
  for (const auto& [kernel, b] : bytes) {
    out << comma << "\"" << kernel << "\": [" << b.read << ", " << b.written << "]";
    comma = ", ";
  }
  out << "}}";
}

void write_resident(std::ostream& out, const Plan& plan, int64_t tasks, int64_t classes) {
  const ResidentCode& code = plan.resident;
  constexpr size_t kSm80 = 163 * 1024;
  const ResidentCode sm_80 = plan.table->resident->encode(plan.schedule, kSm80);
  out << "{\"declines\": \"" << code.refusal << "\", \"declines_sm_80\": \"" << sm_80.refusal << "\"";
  if (code.refusal.empty()) {
    const emu::Launched all = resident(plan, tasks, classes, false), one = resident(plan, 1, classes, true);
    out << ", \"kernel\": \"" << all.kernel << "\", \"blocks\": " << all.blocks << ", \"threads\": " << all.threads
        << ", \"shared\": " << all.shared_bytes << ", \"arena\": " << code.arena_bytes << ", \"arena_sm_80\": " << sm_80.arena_bytes
        << ", \"steps\": " << code.count << ", \"stages\": " << stages_of(code) << ", \"code\": " << code.steps.size()
        << ", \"compulsory\": " << argument_bytes(plan.schedule) << ", \"bytes\": [" << one.bytes_read << ", " << one.bytes_written << "]";
  }
  out << "}";
}

// ---------------------------------------------------------------- around the walk

// What `launch` launches, as a Step of all tasks.
template <class Launch>
Asked around(const std::string& op, int64_t compulsory, const Launch& launch) {
  Asked step;
  step.op = op;
  step.times = 1;
  step.compulsory = compulsory;
  emu::listen([&](const emu::Launched& l) { step.launches.push_back(l); });
  launch();
  emu::listen({});
  return step;
}

struct Buffer {
  explicit Buffer(int64_t numbers) : data(emu::allocate(size_t(numbers) * sizeof(float))) {}
  ~Buffer() { emu::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* const data;
};

// The sum of a result over the tasks, which ends a meta-gradient.
Asked tree_reduce(const OpTable& of, int64_t tasks, int64_t size) {
  const Buffer x(tasks * size), out(size);
  return around("tree_reduce", (tasks + 1) * size * int64_t(sizeof(float)),
                [&] { of.tree_reduce(out.data, x.data, nullptr, tasks, size, size, 0); });
}

// A vector of parameters in another order.
Asked gather(const OpTable& of, int64_t size) {
  const Buffer x(size), out(size), places(size);
  auto* const index = static_cast<int32_t*>(places.data);
  std::iota(index, index + size, 0);
  return around("gather", 3 * size * int64_t(sizeof(float)), [&] { of.device->gather(out.data, x.data, index, 1, size, 0); });
}

// A result, to where the caller gets it.
Asked copy(const OpTable& of, int64_t size) {
  const Buffer x(size), out(size);
  const Device::Piece piece{out.data, x.data, size_t(size) * sizeof(float)};
  return around("copy out", 2 * size * int64_t(sizeof(float)), [&] { of.device->copy(&piece, 1, 0); });
}

// ---------------------------------------------------------------- whole meta-gradients

std::string argument(int count, char** words, const std::string& name, const std::string& otherwise) {
  for (int i = 2; i < count; ++i)
    if (const std::string word = words[i]; word.rfind(name + "=", 0) == 0) return word.substr(name.size() + 1);
  return otherwise;
}

const OpTable& table_of(const std::string& precision) {
  for (const auto& [name, p] :
       {std::pair{"float32", Precision::float32}, {"tf32", Precision::tf32}, {"tf32x3", Precision::tf32x3}, {"bf16x3", Precision::bf16x3}})
    if (precision == name) return cuda_emulated_tensor_ops(p);
  throw std::invalid_argument("no precision is called " + precision);
}

void count(int words, char** word) {
  const auto number = [&](const char* name, const char* otherwise) { return std::stoll(argument(words, word, name, otherwise)); };
  std::ifstream file(word[1]);
  if (!file) throw std::invalid_argument(std::string("cannot read ") + word[1]);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const OpTable& of = table_of(argument(words, word, "precision", "float32"));
  const int64_t tasks = number("tasks", "1"), classes = program_of(text)->output_shape().C;
  CallSpec call;
  call.computation = Computation::meta_gradient;
  call.spec.support_examples = number("support", "1");
  call.spec.query_examples = number("query", "1");
  const auto plan = [&](int steps, Memory memory) {
    call.spec.loop = InnerLoop::parse("steps=" + std::to_string(steps));
    call.memory = memory;
    return plan_for(text, of, call);
  };
  std::vector<int> all_steps;
  std::istringstream list(argument(words, word, "steps", "1"));
  for (std::string steps; std::getline(list, steps, ',');) all_steps.push_back(std::stoi(steps));

  emu::blocks_at_once = cuda_emulated::kBlocksAtOnce;
  emu::only_count_bytes(true);
  const int64_t size = program_of(text)->param_count, outputs = tasks * call.spec.query_examples * program_of(text)->output_shape().size();
  const Asked sum = tree_reduce(of, tasks, size), reorder = gather(of, size), losses = copy(of, tasks), output = copy(of, outputs);
  const char* comma = "[";
  for (const Memory memory : {Memory::low, Memory::stash}) {
    std::map<std::string, Asked> of_one_task;
    for (const int steps : all_steps) {
      const std::shared_ptr<const Plan> p = plan(steps, memory);
      const bool automatic = to_string(plan(steps, Memory::automatic)->schedule) == to_string(p->schedule);
      if (memory == Memory::stash && !automatic) continue;
      if (of_one_task.empty()) {
        const int most = *std::max_element(all_steps.begin(), all_steps.end());
        of_one_task = walk(*plan(std::min(most, 2), memory), 1, classes, true);
      }
      std::cout << comma << "{\"steps\": " << steps << ", \"memory\": \"" << (memory == Memory::low ? "low" : "stash")
                << "\", \"auto\": " << (automatic ? "true" : "false") << ", \"parameters\": " << size << ", \"resident\": ";
      write_resident(std::cout, *p, tasks, classes);
      std::cout << ", \"asked\": [";
      for (const auto& [name, step] : walk(*p, tasks, classes, false)) {
        if (!of_one_task.count(name)) throw std::logic_error("two inner steps never ask for " + name);
        write(std::cout, name, step, of_one_task.at(name));
        std::cout << ",\n ";
      }
      write(std::cout, "tree_reduce of " + std::to_string(tasks) + " tasks x " + std::to_string(size), sum, sum);
      std::cout << "], \"around\": [";
      for (const char* what : {"theta", "rates", "grad"}) {
        write(std::cout, std::string("gather ") + what, reorder, reorder);
        std::cout << ",\n ";
      }
      const Asked support_losses = copy(of, tasks * steps);
      for (const char* what : {"loss", "query losses"}) {
        write(std::cout, std::string("copy out ") + what, losses, losses);
        std::cout << ",\n ";
      }
      write(std::cout, "copy out output", output, output);
      std::cout << ",\n ";
      write(std::cout, "copy out support losses", support_losses, support_losses);
      std::cout << "]}";
      comma = ",\n";
    }
  }
  std::cout << "]\n";
}

}  // namespace
}  // namespace fastmaml

int main(int words, char** word) {
  try {
    if (words < 2) throw std::invalid_argument("count PROGRAM_FILE [support=] [query=] [tasks=] [steps=] [precision=]");
    fastmaml::count(words, word);
    return 0;
  } catch (const std::exception& e) {
    std::cerr << "count: " << e.what() << "\n";
    return 1;
  }
}
