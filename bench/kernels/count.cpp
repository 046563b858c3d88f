// Counts what a meta-gradient asks of a GPU, on the emulated CUDA table: launches for all tasks, announced and not run; and the bytes of
// global memory that the kernels request, of one task that really runs (race build). A task's bytes do not depend on the batch, and
// every inner step asks for the same: so one inner step of one task stands for all.
//   count PROGRAM_FILE support=5 query=75 tasks=32 steps=1,5 memory=low precision=float32        writes JSON; static.py is its caller
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <stdexcept>

#include "cuda/choose.h"
#include "cuda/cuda_tables.h"
#include "cuda_op_runs.h"
#include "meta/meta.h"
#include "networks.h"

namespace fastmaml {
namespace {

constexpr uintptr_t kAnnounce = 0, kRun = 1;  // the stream tells the functions of the counting table which

// ---------------------------------------------------------------- a Step, and what it must do

// The same for all Steps that ask for the same.
std::string key_of(const Call& call) {
  std::string present;
  const std::vector<Role> role = roles(call.step.op);
  for (size_t k = 0; k < role.size(); ++k)
    if (role[k].optional && !call[int(k)]) present += " -" + role[k].name;
  const Case c{call.step.op, call.layer, call.step.examples, 1, call.step.stat_examples};
  std::string key = name_of(c, 4, present);
  key.erase(key.find(" float32"), 8);
  key.erase(key.find(", 1 tasks,"), 10);
  return key;
}

// Every operand once, in bytes of one task.
int64_t compulsory_bytes(const Call& call) {
  const Case c{call.step.op, call.layer, call.step.examples, 1, call.step.stat_examples};
  const std::vector<Role> role = roles(call.step.op);
  int64_t bytes = 0;
  for (size_t k = 0; k < role.size(); ++k) {
    if (!call[int(k)]) continue;
    const bool twice = k < outputs(call.step.op) && in_place(call.step.op);
    bytes += size_of(c, role[k].name) * int64_t(element_bytes<float>(role[k].name)) * (twice ? 2 : 1);
  }
  return bytes;
}

// Of the products; the rest of the ops is bound by memory.
int64_t flops(const Call& call) {
  int64_t one;
  Op first;
  if (const auto* s = std::get_if<Linear>(&call.layer)) {
    one = 2 * call.step.examples * s->in * s->out;
    first = Op::linear_fwd;
  } else if (const auto* s = std::get_if<Conv2d>(&call.layer)) {
    one = 2 * call.step.examples * s->OH * s->OW * s->F * s->KH * s->KW * s->C;
    first = Op::conv2d_fwd;
  } else {
    return 0;
  }
  switch (static_cast<int>(call.step.op) - static_cast<int>(first)) {
    case 1:  // fwd_jvp: x w_dot, and x_dot w
      return one * (call[2] ? 2 : 1);
    case 2:  // fwd_dual
      return one * (call[3] ? 3 : 2);
    case 4:  // bwd_data_jvp
      return 2 * one;
    case 5:  // bwd_data_dual
      return 3 * one;
    case 7:  // bwd_weight_jvp
      return one * (call[3] ? 2 : 1);
    default:
      return one;
  }
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
  step.flops = flops(call);
  step.compulsory = compulsory_bytes(call);
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
std::map<std::string, Asked> walk(const Schedule& schedule, const OpTable& of, int64_t tasks, int64_t classes, bool run) {
  const OpTable counting_table = counting(of, std::make_integer_sequence<int, kOps>());
  Arguments<float> arguments(schedule, tasks, classes);
  Arenas arenas;
  asked.clear();
  run_layered({counting_table, schedule, plan_workspace(schedule, counting_table), arguments.views, tasks, 1, run ? kRun : kAnnounce},
              arenas);
  return asked;
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

// The sum of a result over the tasks, which ends a meta-gradient: as a Step of all tasks.
Asked tree_reduce(const OpTable& of, int64_t tasks, int64_t size) {
  auto* x = static_cast<float*>(emu::allocate(size_t(tasks * size) * sizeof(float)));
  auto* out = static_cast<float*>(emu::allocate(size_t(size) * sizeof(float)));
  Asked step;
  step.op = "tree_reduce";
  step.times = 1;
  step.compulsory = (tasks + 1) * size * int64_t(sizeof(float));
  emu::listen([&](const emu::Launched& l) { step.launches.push_back(l); });
  of.tree_reduce(out, x, nullptr, tasks, size, 0);
  emu::listen({});
  emu::free(x);
  emu::free(out);
  return step;
}

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
  const Program net = Program::parse({std::istreambuf_iterator<char>(file), {}});
  const OpTable& of = table_of(argument(words, word, "precision", "float32"));
  const int64_t tasks = number("tasks", "1");
  Adaptation how;
  how.support_examples = number("support", "1");
  how.query_examples = number("query", "1");
  how.stash = argument(words, word, "memory", "low") == "stash";
  const auto schedule = [&](const std::string& steps) {
    how.loop = InnerLoop::parse("steps=" + steps);
    return meta_gradient_schedule(net, how);
  };
  emu::blocks_at_once = cuda_emulated::kBlocksAtOnce;
  emu::only_count_bytes(true);
  const Schedule one = schedule("1");
  const std::map<std::string, Asked> of_one_task = walk(one, of, 1, net.output_shape().C, true);
  int64_t size = 0;
  for (const Slot& slot : one.slots)
    if (slot.arg == Arg::grad) size = slot.size;
  const Asked sum = tree_reduce(of, tasks, size);

  std::istringstream all(argument(words, word, "steps", "1"));
  const char* comma = "[";
  for (std::string steps; std::getline(all, steps, ','); comma = ",\n") {
    std::cout << comma << "{\"steps\": " << steps << ", \"parameters\": " << size << ", \"asked\": [";
    for (const auto& [name, step] : walk(schedule(steps), of, tasks, 2, false)) {
      if (!of_one_task.count(name)) throw std::logic_error("one inner step never asks for " + name);
      write(std::cout, name, step, of_one_task.at(name));
      std::cout << ",\n ";
    }
    write(std::cout, "tree_reduce of " + std::to_string(tasks) + " tasks x " + std::to_string(size), sum, sum);
    std::cout << "]}";
  }
  std::cout << "]\n";
}

}  // namespace
}  // namespace fastmaml

int main(int words, char** word) {
  try {
    if (words < 2) throw std::invalid_argument("count PROGRAM_FILE [support=] [query=] [tasks=] [steps=] [memory=] [precision=]");
    fastmaml::count(words, word);
    return 0;
  } catch (const std::exception& e) {
    std::cerr << "count: " << e.what() << "\n";
    return 1;
  }
}
