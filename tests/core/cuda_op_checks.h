// Does an op of the emulated CUDA table compute what the reference computes? On random operands of small odd sizes, shared by the tasks and
// per task, optional ones there and absent, aligned and not, in two orders of threads; and with the same bits each time.
#pragma once

#include <algorithm>
#include <chrono>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>

#include "cuda/cuda_tables.h"
#include "cuda_op_runs.h"

namespace fastmaml {

inline int passed = 0, failed = 0;

inline void report(bool ok, const std::string& what, const std::string& detail = "") {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAIL  %s  %s\n", what.c_str(), detail.c_str());
}

// In float32 the device's rounding, of formulas with some cancellation and of conv2d's sums of 300 products. In float64 it is the reference
// that is less exact: it adds up 5000 terms one by one.
template <class T>
constexpr double kTolerance = double(std::numeric_limits<T>::epsilon()) * (sizeof(T) == 4 ? 64 : 512);

inline std::map<Op, double> largest_error[2];  // in units of epsilon, by type

// ---------------------------------------------------------------- one case

enum class Presence { always, never, either };

// An average b is there except in the first step; what a pool adds is there if and only if there is a pool; what masks ([x], [y]) only
// where there is a rectifier.
inline Presence presence(const Case& c, const Role& role) {
  const auto* momentum = std::get_if<Momentum>(&c.layer);
  const auto* fused = std::get_if<NormPoolAct>(&c.layer);
  if (role.optional && (role.name == "x" || role.name == "y"))
    return (role.name == "x" ? rectified_input : rectified_output)(c.layer).on ? Presence::either : Presence::never;
  if (!role.optional || (momentum && !momentum->first && role.name == "b")) return Presence::always;
  if (fused && (role.name == "tap" || (c.op == Op::norm_pool_act_fwd && role.name == "winner")))
    return fused->pooled ? Presence::always : Presence::never;
  if (fused && role.name == "winner_dot" && c.op == Op::norm_pool_act_fwd_jvp && !fused->pooled) return Presence::never;
  return Presence::either;
}

// Operands of which one is there if and only if the other is.
inline std::vector<std::pair<std::string, std::string>> together(Op op) {
  if (op == Op::norm_pool_act_fwd_jvp) return {{"x_dot", "winner_dot"}};
  if (op == Op::sgd_adjoint) return {{"rate_grad", "g"}, {"u", "rate"}};
  return {};
}

// Which optional operands are absent: none, all, each alone.
inline std::vector<std::set<size_t>> absences(const Case& c) {
  const std::vector<Role> role = roles(c.op);
  std::set<size_t> all, never;
  for (size_t k = 0; k < role.size(); ++k) {
    if (presence(c, role[k]) == Presence::either) all.insert(k);
    if (presence(c, role[k]) == Presence::never) never.insert(k);
  }
  std::vector<std::set<size_t>> out{never};
  const auto add = [&](std::set<size_t> absent) {
    absent.insert(never.begin(), never.end());
    for (const auto& [one, other] : together(c.op))
      for (size_t k : std::set<size_t>(absent))
        for (size_t l : all)
          if ((role[k].name == one && role[l].name == other) || (role[k].name == other && role[l].name == one)) absent.insert(l);
    if (std::find(out.begin(), out.end(), absent) == out.end()) out.push_back(absent);
  };
  if (!all.empty()) add(all);
  if (all.size() > 1)
    for (size_t k : all) add({k});
  return out;
}

// Each case has numbers of its own, whatever ran before.
template <class T>
Operands draw_all(const Case& c) {
  Operands all;
  const std::string name = name_of(c, sizeof(T), "");
  std::seed_seq seed(name.begin(), name.end());
  random_bits.seed(seed);
  for (const Role& role : roles(c.op)) {
    all.values.emplace_back();
    for (int64_t t = 0; t < c.tasks; ++t) all.values.back().push_back(draw<T>(c, role.name));
  }
  return all;
}

// What the reference makes of it. Where y is around 0, rounding decides whether y_dot goes through a rectifier: the y that was got does.
inline Operands definition(const Case& c, const Operands& given, const Operands& got) {
  Operands want = on_reference(c, given, {});
  if ((c.op != Op::linear_fwd_dual && c.op != Op::conv2d_fwd_dual) || !rectified_output(c.layer).on) return want;
  Case jvp = c;
  jvp.op = c.op == Op::linear_fwd_dual ? Op::linear_fwd_jvp : Op::conv2d_fwd_jvp;
  const auto& v = given.values;
  want.values[1] = on_reference(jvp, {{v[1], v[2], v[3], v[4], v[5], v[7], got.values[0]}}, {}).values[0];
  return want;
}

template <class T>
void check(const Case& c) {
  const std::vector<Role> role = roles(c.op);
  const Operands all = draw_all<T>(c);
  const std::vector<std::set<size_t>> variants = absences(c);
  for (const std::set<size_t>& absent : variants) {
    // The race build watched float32 without these operands: the same source, with the same barriers.
    if (emu::watched() && sizeof(T) == sizeof(double) && absent != variants[0]) continue;
    Operands given = all;
    std::string variant = "all operands";
    for (size_t k : absent) {
      given.values[k].clear();
      variant = (variant == "all operands" ? "without " : variant + " ") + std::string(role[k].name);
    }
    const auto name = [&](const std::string& more) { return name_of(c, sizeof(T), variant + more); };
    try {
      const size_t written = op_outputs(c.op);
      const Operands got = on_device<T>(c, given, {});
      const Worst w = worst(c, got, definition(c, given, got));
      report(w.error <= kTolerance<T>, name(""), w.where);
      double& largest = largest_error[sizeof(T) / 8][c.op];
      largest = std::max(largest, w.error / double(std::numeric_limits<T>::epsilon()));
      bool kept = true;
      for (size_t k = written; k < role.size(); ++k)
        for (size_t t = 0; t < got.values[k].size(); ++t)
          for (size_t i = 0; i < got.values[k][t].size(); ++i)
            kept = kept && (got.values[k][t][i] == given.values[k][t][i] || got.values[k][t][i] == double(T(given.values[k][t][i])));
      report(kept, name(": inputs stay as they are"));
      if (absent != variants[0]) continue;

      // The race build finds a race in any order and leaves numbers to the other one: it runs each way of access once.
      const bool numbers = !emu::watched();
      if (numbers) {
        emu::set_order(emu::Order::random, 5);
        report(same_bits(got, 0, on_device<T>(c, given, {}), c.tasks, written), name(": the same bits in another order of threads"));
        emu::set_order(emu::Order::ascending);
      }
      How unaligned;
      unaligned.aligned = false;
      report(same_bits(got, 0, on_device<T>(c, given, unaligned), c.tasks, written), name(": the same bits where nothing is aligned"));
      if (c.tasks == 1) continue;
      How shared;
      shared.shared = true;
      const Operands of_shared = on_device<T>(c, given, shared);
      if (!numbers) continue;
      How last;
      last.first = c.tasks - 1;
      last.tasks = 1;
      report(same_bits(got, c.tasks - 1, on_device<T>(c, given, last), 1, written), name(": the last task alone has the same bits"));
      Operands copies = given;
      for (size_t k = written; k < role.size(); ++k)
        for (Vec& x : copies.values[k]) x = copies.values[k][0];
      report(same_bits(on_device<T>(c, copies, {}), 0, of_shared, c.tasks, written), name(": inputs shared by the tasks"));
    } catch (const std::exception& e) {
      report(false, name(""), e.what());
    }
  }
}

inline void check_ops(std::initializer_list<Op> ops, const Layer& layer, int64_t N, int64_t tasks, int64_t stat_N = 0) {
  for (Op op : ops) {
    const Case c{op, layer, N, tasks, stat_N};
    check<float>(c);
    check<double>(c);
  }
}

// ---------------------------------------------------------------- what ran

inline bool is_linear(Op op) { return std::string_view(op_name(op)).starts_with("linear_"); }
inline bool is_conv2d(Op op) { return std::string_view(op_name(op)).starts_with("conv2d_"); }
inline bool is_no_product(Op op) { return !is_linear(op) && !is_conv2d(op); }

// Every op of this program's kind is in the table and was tested. That every kernel ran, tests/emulated/test_kernel_coverage.py asks.
inline void coverage(bool (*covers)(Op)) {
  const std::set<Op> of_the_host{Op::pointwise_fwd_dual, Op::pointwise_bwd_dual, Op::uniform_update, Op::linear_update,
                                 Op::linear_adjoint};  // a device takes what they are made of
  for (int i = 0; i < kOps; ++i) {
    const Op op = static_cast<Op>(i);
    if (is_python_loss(op) || !covers(op)) continue;
    const std::string name = op_name(op);
    if (of_the_host.count(op)) {
      report(!cuda_emulated_ops(4).run[i] && !cuda_emulated_ops(8).run[i], name + " is the host's");
      continue;
    }
    report(cuda_emulated_ops(4).run[i] && cuda_emulated_ops(8).run[i], name + " is in the table");
    report(largest_error[0].count(op) > 0, name + " was tested");
  }
}

struct Group {
  const char* name;
  void (*cases)();
};

// The groups that are named, or all and then coverage of the ops that the program covers. Its exit status.
inline int run_groups(std::initializer_list<Group> groups, int count, char** names, bool (*covers)(Op)) {
  emu::set_order(emu::Order::ascending);
  for (const Group& group : groups) {
    if (count > 1 && std::find(names + 1, names + count, std::string(group.name)) == names + count) continue;
    const auto start = std::chrono::steady_clock::now();
    const int before = passed;
    group.cases();
    std::printf("%-10s %6d passed, %.1f s\n", group.name, passed - before,
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  for (const auto& [op, error] : largest_error[0])
    std::printf("%-28s largest error %6.1f eps in float32, %6.1f in float64\n", op_name(op), error, largest_error[1][op]);
  if (count == 1 && covers) coverage(covers);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

}  // namespace fastmaml
