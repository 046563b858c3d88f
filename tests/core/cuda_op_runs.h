// One op on random operands: drawn by their roles in program/op.h, run by the emulated table and by the reference, and compared.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/emulated/emu.h"
#include "ops/ops.h"
#include "plan/cost.h"

namespace fastmaml {

const OpTable& cuda_emulated_ops(size_t real_bytes);

namespace {

using Vec = std::vector<double>;  // one operand of one task; indices and labels are held as doubles too

// ---------------------------------------------------------------- operands

struct Case {
  Op op;
  Layer layer;
  int64_t N = 1;
  int64_t tasks = 2;
  int64_t stat_N = 0;  // 0: all
};

// Numbers of an operand, per task.
int64_t size_of(const Case& c, std::string_view role) { return operand_size(c.layer, role, c.N); }

template <class T>
void put(std::string_view role, std::byte* at, double value) {
  const auto write = [&](auto v) { std::memcpy(at, &v, sizeof v); };
  role == "index"    ? write(int32_t(value))
  : role == "tap"    ? write(int8_t(value))
  : role == "labels" ? write(int64_t(value))
                     : write(T(value));
}

template <class T>
double get(std::string_view role, const std::byte* at) {
  const auto read = [&](auto v) {
    std::memcpy(&v, at, sizeof v);
    return double(v);
  };
  return role == "index" ? read(int32_t()) : role == "tap" ? read(int8_t()) : role == "labels" ? read(int64_t()) : read(T());
}

// ---------------------------------------------------------------- random operands

std::mt19937 random_bits(1);
double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_bits); }

// A tap of every window that lies in the image.
Vec draw_index(const Pool2d& s, int64_t N) {
  Vec index;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t oh = 0; oh < s.OH; ++oh)
      for (int64_t ow = 0; ow < s.OW; ++ow)
        for (int64_t c = 0; c < s.C; ++c) {
          int64_t kh, kw, h, w;
          do {
            kh = int64_t(random_bits() % unsigned(s.KH));
            kw = int64_t(random_bits() % unsigned(s.KW));
            h = oh * s.stride_h - s.pad_h + kh;
            w = ow * s.stride_w - s.pad_w + kw;
          } while (h < 0 || h >= s.H || w < 0 || w >= s.W);
          index.push_back(double(kh * s.KW + kw));
        }
  return index;
}

// What T can hold, so that both tables start from the same numbers.
template <class T>
Vec draw(const Case& c, std::string_view role) {
  if (role == "index") return draw_index(std::get<Pool2d>(c.layer), c.N);
  if (role == "tap") {
    Vec tap = draw_index(std::get<NormPoolAct>(c.layer).pool, c.N);
    for (double& v : tap)
      if (random_bits() % 2) v = -1 - v;  // ~tap
    return tap;
  }
  Vec x(size_t(size_of(c, role)));
  for (double& v : x) v = double(T(uniform(-1.5, 1.5)));
  if (role == "labels")
    for (double& v : x) v = double(random_bits() % uint64_t(std::get<Loss>(c.layer).size));
  const bool adam = std::holds_alternative<Adam>(c.layer);  // its s is a mean of squares
  if (role == "mask")
    for (double& v : x) v = double(random_bits() % 4 > 0);
  if (role == "step_count") x = {3};
  if (role == "var" || role == "weights" || role == "settings" || (adam && role == "s"))
    for (double& v : x) v = std::fabs(v) + 0.125;
  if (role == "stats" && (std::holds_alternative<BatchNorm>(c.layer) || std::holds_alternative<NormPoolAct>(c.layer))) {
    const size_t C = x.size() / 3;
    for (size_t i = 0; i < C; ++i) {
      const double mean = uniform(-1.5, 1.5);  // more of it than T holds
      x[i] = mean;
      x[C + i] = std::fabs(x[C + i]) + 0.125;
      x[2 * C + i] = double(T(mean - double(T(mean))));
    }
  }
  if (role == "stats" && std::holds_alternative<GroupNorm>(c.layer))
    for (size_t i = 1; i < x.size(); i += 2) x[i] = std::fabs(x[i]) + 0.125;
  if (role == "state") x = {double(T(uniform(0.5, 3))), 2, double(random_bits() % 4 > 0), 1, 0};
  return x;
}

// ---------------------------------------------------------------- running

struct How {
  bool shared = false;  // task 0's inputs serve all tasks
  bool aligned = true;
  int64_t first = 0, tasks = 0;  // which of the tasks; 0: all
};

struct Operands {
  std::vector<std::vector<Vec>> values;  // [operand][task]; empty: absent
};

// Runs `op` of the table on its operands; what it wrote and what it should not have written come back. alloc: device or host memory.
template <class T, class Alloc, class Free>
Operands run(const OpTable& table, const Case& c, const Operands& given, const How& how, Alloc alloc, Free release) {
  const std::vector<Role> role = roles(c.op);
  const int64_t T_ = how.tasks ? how.tasks : c.tasks;
  const size_t written = op_outputs(c.op);
  std::vector<std::byte*> memory(role.size(), nullptr);
  std::vector<View> views(kMaxOperands);
  for (size_t k = 0; k < role.size(); ++k) {
    if (given.values[k].empty()) continue;
    const size_t bytes = operand_element_bytes(role[k].name, sizeof(T)), size = given.values[k][0].size();
    const bool shared = how.shared && k >= written;
    const size_t shift = how.aligned ? 0 : bytes;
    memory[k] = static_cast<std::byte*>(alloc(shift + bytes * size * size_t(shared ? 1 : T_)));
    views[k] = {memory[k] + shift, shared ? 0 : int64_t(size), 1};
    if (k < written && !op_in_place(c.op)) continue;  // stays poisoned
    for (int64_t t = 0; t < (shared ? 1 : T_); ++t)
      for (size_t i = 0; i < size; ++i)
        put<T>(role[k].name, static_cast<std::byte*>(views[k].data) + (size_t(t) * size + i) * bytes,
               given.values[k][size_t(how.first + t)][i]);
  }
  const Step step{c.op, 0, c.N, c.stat_N ? c.stat_N : c.N, {}};
  std::byte* scratch = nullptr;
  if (const ScratchFn scratch_bytes = table.scratch[static_cast<int>(c.op)])
    if (const size_t bytes = scratch_bytes(step, c.layer)) scratch = static_cast<std::byte*>(alloc(bytes));
  table.run[static_cast<int>(c.op)](Call{step, c.layer, views.data(), T_, scratch, 0});

  Operands after;
  after.values.resize(role.size());
  for (size_t k = 0; k < role.size(); ++k) {
    if (!memory[k]) continue;
    const size_t bytes = operand_element_bytes(role[k].name, sizeof(T)), size = given.values[k][0].size();
    for (int64_t t = 0; t < T_; ++t) {
      Vec x(size);
      const std::byte* from = static_cast<std::byte*>(views[k].data) + size_t(t * views[k].task_stride) * bytes;
      for (size_t i = 0; i < size; ++i) x[i] = get<T>(role[k].name, from + i * bytes);
      after.values[k].push_back(x);
    }
    release(memory[k]);
  }
  if (scratch) release(scratch);
  return after;
}

Operands on_reference(const Case& c, const Operands& given, const How& how) {
  return run<double>(
      reference_ops(), c, given, how,
      [](size_t bytes) {
        void* memory = std::malloc(bytes);
        std::memset(memory, 0xff, bytes);
        return memory;
      },
      [](void* memory) { std::free(memory); });
}

template <class T>
Operands on_device(const Case& c, const Operands& given, const How& how) {
  return run<T>(cuda_emulated_ops(sizeof(T)), c, given, how, emu::allocate, emu::free);
}

// ---------------------------------------------------------------- comparing

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

bool same_bits(const Operands& a, int64_t a_first, const Operands& b, int64_t tasks, size_t operands) {
  for (size_t k = 0; k < operands; ++k) {
    if (a.values[k].empty() != b.values[k].empty()) return false;
    if (a.values[k].empty()) continue;
    for (int64_t t = 0; t < tasks; ++t)
      for (size_t i = 0; i < b.values[k][0].size(); ++i)
        if (!same(a.values[k][size_t(a_first + t)][i], b.values[k][size_t(t)][i])) return false;
  }
  return true;
}

// The worst entry of the op's outputs, relative to the largest number of the operand it is in.
struct Worst {
  double error = 0;
  std::string where = "";
};

Worst worst(const Case& c, const Operands& got, const Operands& want) {
  const std::vector<Role> role = roles(c.op);
  Worst w;
  for (size_t k = 0; k < op_outputs(c.op); ++k) {
    if (got.values[k].empty()) continue;
    double scale = 0;
    for (const Vec& x : want.values[k])
      for (double v : x) scale = std::isfinite(v) ? std::max(scale, std::fabs(v)) : scale;
    // The reference leaves the mean's rounding error of batch norm's stats to the backend.
    const size_t size =
        c.op == Op::batch_norm_stats || c.op == Op::batch_norm_frozen_stats ? want.values[k][0].size() / 3 * 2 : want.values[k][0].size();
    for (size_t t = 0; t < want.values[k].size(); ++t)
      for (size_t i = 0; i < size; ++i) {
        const double g = got.values[k][t][i], v = want.values[k][t][i];
        if (same(g, v)) continue;
        double error = std::fabs(g - v) / (scale > 0 ? scale : 1);
        if (std::isnan(error)) error = std::numeric_limits<double>::infinity();
        if (error <= w.error) continue;
        char text[160];
        const std::string name(role[k].name);
        std::snprintf(text, sizeof text, "%s, task %zu [%zu]: got %.9g, expected %.17g, error %.2e of the largest", name.c_str(), t, i, g,
                      v, error);
        w = {error, text};
      }
  }
  return w;
}

std::string name_of(const Case& c, size_t real_bytes, const std::string& variant) {
  struct Text {
    std::string operator()(const Vector& s) const { return std::to_string(s.size); }
    std::string operator()(const Add& s) const { return std::to_string(s.size); }
    std::string operator()(const Axpy& s) const { return std::to_string(s.size); }
    std::string operator()(const Clip& s) const { return std::to_string(s.size); }
    std::string operator()(const Momentum& s) const {
      return std::to_string(s.size) + (s.first ? " first" : "") + (s.nesterov ? " nesterov" : "");
    }
    std::string operator()(const Adam& s) const { return std::to_string(s.size); }
    std::string operator()(const PythonLoss&) const { return "written in Python"; }
    std::string operator()(const Linear& s) const { return std::to_string(s.in) + " to " + std::to_string(s.out) + rectified(s.y, s.x); }
    std::string operator()(const Conv2d& s) const {
      return join({s.C, s.H, s.W, s.F, s.KH, s.KW, s.stride_h, s.stride_w, s.pad_h, s.pad_w}) + " (C H W F KH KW strides pads)" +
             rectified(s.y, s.x);
    }
    std::string operator()(const BatchNorm& s) const { return join({s.C, s.spatial}) + (s.frozen ? " frozen" : "") + " (C pixels)"; }
    std::string operator()(const GroupNorm& s) const {
      return join({s.channels, s.spatial, s.groups}) + " (C pixels groups)" + rectified(s.y, {});
    }
    std::string operator()(const Pointwise& s) const { return join({s.size, int(s.kind)}) + " (size kind)"; }
    std::string operator()(const Pool2d& s) const {
      return join({s.C, s.H, s.W, s.KH, s.KW, s.stride_h, s.stride_w, s.pad_h, s.pad_w}) + " (C H W KH KW strides pads)";
    }
    std::string operator()(const NormPoolAct& s) const {
      return (*this)(s.pool) + (s.pooled ? "" : " no pool") + (s.slope > 0 ? " leaky" : "") + (s.norm.frozen ? " frozen" : "");
    }
    std::string operator()(const Flatten& s) const { return join({s.C, s.H, s.W}) + " (C H W)"; }
    std::string operator()(const Loss& s) const { return join({s.size}) + (s.smoothing > 0 ? " smoothed" : ""); }
    static std::string rectified(const Rectified& y, const Rectified& x) {
      const auto text = [](const char* name, const Rectified& how) {
        return how.on ? std::string(how.slope > 0 ? " leaky " : " rectified ") + name : "";
      };
      return text("y", y) + text("x", x);
    }
    static std::string join(std::initializer_list<int64_t> numbers) {
      std::string text;
      for (int64_t n : numbers) text += (text.empty() ? "" : " ") + std::to_string(n);
      return text;
    }
  };
  return std::string(op_name(c.op)) + (real_bytes == 4 ? " float32 " : " float64 ") + std::visit(Text(), c.layer) + ", N " +
         std::to_string(c.N) + ", " + std::to_string(c.tasks) + " tasks, " + variant;
}

}  // namespace
}  // namespace fastmaml
