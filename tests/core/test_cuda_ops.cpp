// Does every op of the emulated CUDA table compute what the reference computes? On random operands of small odd sizes, shared by the tasks
// and per task, optional ones there and absent, aligned and not, in two orders of threads; and with the same bits each time.
#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <set>
#include <stdexcept>

#include "cuda/cuda_tables.h"
#include "cuda_op_runs.h"
#include "cuda_product_cases.h"

namespace fastmaml {
namespace {

int passed = 0, failed = 0;

void report(bool ok, const std::string& what, const std::string& detail = "") {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAIL  %s  %s\n", what.c_str(), detail.c_str());
}

// In float32 the device's rounding, of formulas with some cancellation and of conv2d's sums of 300 products. In float64 it is the reference
// that is less exact: it adds up 5000 terms one by one.
template <class T>
constexpr double kTolerance = double(std::numeric_limits<T>::epsilon()) * (sizeof(T) == 4 ? 64 : 512);

std::map<Op, double> largest_error[2];  // in units of epsilon, by type

// ---------------------------------------------------------------- one case

enum class Presence { always, never, either };

// An average b is there except in the first step; what a pool adds is there if and only if there is a pool; what masks ([x], [y]) only
// where there is a rectifier.
Presence presence(const Case& c, const Role& role) {
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
std::vector<std::pair<std::string, std::string>> together(Op op) {
  if (op == Op::norm_pool_act_fwd_jvp) return {{"x_dot", "winner_dot"}};
  if (op == Op::sgd_adjoint) return {{"rate_grad", "g"}, {"u", "rate"}};
  return {};
}

// Which optional operands are absent: none, all, each alone.
std::vector<std::set<size_t>> absences(const Case& c) {
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
Operands definition(const Case& c, const Operands& given, const Operands& got) {
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

      emu::set_order(emu::Order::random, 5);
      report(same_bits(got, 0, on_device<T>(c, given, {}), c.tasks, written), name(": the same bits in another order of threads"));
      emu::set_order(emu::Order::ascending);
      How unaligned;
      unaligned.aligned = false;
      report(same_bits(got, 0, on_device<T>(c, given, unaligned), c.tasks, written), name(": the same bits where nothing is aligned"));
      if (c.tasks > 1) {
        How last;
        last.first = c.tasks - 1;
        last.tasks = 1;
        report(same_bits(got, c.tasks - 1, on_device<T>(c, given, last), 1, written), name(": the last task alone has the same bits"));
        How shared;
        shared.shared = true;
        Operands copies = given;
        for (size_t k = written; k < role.size(); ++k)
          for (Vec& x : copies.values[k]) x = copies.values[k][0];
        report(same_bits(on_device<T>(c, copies, {}), 0, on_device<T>(c, given, shared), c.tasks, written),
               name(": inputs shared by the tasks"));
      }
    } catch (const std::exception& e) {
      report(false, name(""), e.what());
    }
  }
}

void check_ops(std::initializer_list<Op> ops, const Layer& layer, int64_t N, int64_t tasks, int64_t stat_N = 0) {
  for (Op op : ops) {
    const Case c{op, layer, N, tasks, stat_N};
    check<float>(c);
    check<double>(c);
  }
}

// ---------------------------------------------------------------- cases

void vectors() {
  for (int64_t size : {1, 2, 3, 5, 31, 33, 65, 1030}) {
    const int64_t tasks = 1 + size % 3;
    check_ops({Op::fill_zero, Op::copy, Op::add, Op::sgd_update, Op::scale_by_rate, Op::rate_grad, Op::adjoint_update, Op::sgd_adjoint},
              Vector{size}, 1, tasks);
    check_ops({Op::cg_start, Op::cg_step, Op::cg_residual}, Vector{size}, 1, 3);
    check_ops({Op::proximal}, Vector{size}, 1, 3);
    check_ops({Op::axpy}, Axpy{size, 0.7}, 1, 3);
    check_ops({Op::clip_value, Op::clip_value_adjoint}, Clip{size, 0.6}, 1, 3);
    for (double limit : {0.4, 1e3}) check_ops({Op::clip_norm, Op::clip_norm_adjoint}, Clip{size, limit}, 1, 3);
    for (bool nesterov : {false, true})
      for (bool first : {false, true})
        check_ops({Op::momentum_update, Op::momentum_adjoint}, Momentum{size, 0.9, nesterov ? 0.0 : 0.2, nesterov, first}, 1, 3);
    for (double decay : {0.0, 0.1}) check_ops({Op::adam_update, Op::adam_adjoint}, Adam{size, 0.9, 0.99, 1e-3, decay, 2}, 1, 3);
  }
  check_ops({Op::cg_start, Op::cg_step}, Vector{4100}, 1, 2);
  check_ops({Op::add}, Add{33}, 3, 2);
  for (const Flatten& s : {Flatten{3, 2, 5}, {5, 1, 7}, {1, 3, 3}, {64, 5, 5}, {33, 12, 11}, {31, 1, 1}})
    check_ops({Op::flatten_fwd, Op::flatten_bwd}, s, 2, 2);
}

void pointwise() {
  using Kind = Pointwise::Kind;
  for (Kind kind : {Kind::relu, Kind::leaky_relu, Kind::tanh, Kind::sigmoid, Kind::gelu, Kind::gelu_tanh, Kind::silu})
    for (int64_t size : {1, 5, 33})
      check_ops({Op::pointwise_fwd, Op::pointwise_fwd_jvp, Op::pointwise_bwd, Op::pointwise_bwd_jvp}, Pointwise{kind, 0.1, size}, 3,
                1 + size % 3);
}

constexpr std::initializer_list<Op> kBatchNormOps = {
    Op::batch_norm_stats,      Op::batch_norm_frozen_stats,   Op::batch_norm_stats_jvp, Op::batch_norm_fwd,         Op::batch_norm_fwd_jvp,
    Op::batch_norm_bwd_weight, Op::batch_norm_bwd_weight_jvp, Op::batch_norm_bwd_data,  Op::batch_norm_bwd_data_jvp};

void norms() {
  struct Sizes {
    int64_t C, spatial, N, stat_N, tasks;
    bool frozen = false;
  };
  for (const Sizes& z : {Sizes{1, 1, 1, 1, 1},
                         {3, 1, 5, 5, 2},
                         {5, 6, 3, 3, 3},
                         {31, 2, 3, 2, 2},
                         {33, 9, 5, 3, 2},
                         {64, 4, 5, 5, 2},
                         {65, 1, 31, 31, 1},
                         {8, 1, 2, 1, 3},
                         {36, 5, 3, 3, 2, true},
                         {3, 7, 2, 2, 1, true}})
    check_ops(kBatchNormOps, BatchNorm{z.C, z.spatial, 1e-5, z.frozen}, z.N, z.tasks, z.stat_N);
  for (int64_t C : {3, 4})  // sums in parts
    check_ops(
        {Op::batch_norm_stats, Op::batch_norm_stats_jvp, Op::batch_norm_fwd, Op::batch_norm_bwd_weight, Op::batch_norm_bwd_weight_jvp},
        BatchNorm{C, 1400, 1e-3, false}, 3, 2);
  check_ops({Op::batch_norm_stats, Op::batch_norm_bwd_weight}, BatchNorm{1, 833, 1e-3, false}, 5,
            700);  // and more tasks than share the scratch

  for (const auto& [channels, spatial, groups, N] : {std::array<int64_t, 4>{1, 1, 1, 1},
                                                     {5, 1, 1, 3},
                                                     {33, 1, 1, 5},
                                                     {64, 1, 1, 2},
                                                     {6, 5, 3, 2},
                                                     {8, 9, 2, 3},
                                                     {12, 4, 3, 5},
                                                     {65, 2, 5, 2},
                                                     {40, 31, 2, 2},
                                                     {4, 1030, 1, 4}})
    check_ops({Op::group_norm_fwd, Op::group_norm_fwd_jvp, Op::group_norm_bwd, Op::group_norm_bwd_jvp},
              GroupNorm{channels, spatial, groups, 1e-5}, N, 2);
  for (const auto& [channels, spatial, groups, N] :
       {std::array<int64_t, 4>{1, 1, 1, 3}, {33, 1, 1, 5}, {64, 1, 1, 2}, {6, 5, 3, 2}, {8, 9, 2, 3}, {65, 2, 5, 2}, {4, 1030, 1, 4}})
    for (double slope : {0.0, 0.2})
      check_ops({Op::group_norm_fwd, Op::group_norm_fwd_jvp, Op::group_norm_bwd, Op::group_norm_bwd_jvp},
                GroupNorm{channels, spatial, groups, 1e-5, {true, slope}}, N, 2);
}

Pool2d pool(int64_t C, int64_t H, int64_t W, int64_t KH, int64_t KW, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
            bool count_include_pad) {
  return {C,
          H,
          W,
          (H + 2 * pad_h - KH) / stride_h + 1,
          (W + 2 * pad_w - KW) / stride_w + 1,
          KH,
          KW,
          stride_h,
          stride_w,
          pad_h,
          pad_w,
          count_include_pad};
}

void pools() {
  for (const Pool2d& s :
       {pool(1, 1, 1, 1, 1, 1, 1, 0, 0, true), pool(3, 5, 7, 2, 2, 2, 2, 0, 0, true), pool(4, 6, 5, 2, 2, 2, 2, 0, 0, false),
        pool(33, 7, 5, 3, 3, 2, 2, 1, 1, true), pool(8, 5, 5, 3, 3, 1, 1, 1, 1, false), pool(5, 9, 8, 2, 3, 3, 2, 1, 1, true),
        pool(2, 8, 7, 3, 2, 3, 2, 0, 0, true), pool(31, 5, 5, 5, 5, 1, 1, 0, 0, true), pool(64, 4, 4, 2, 2, 2, 2, 0, 0, true),
        pool(6, 4, 5, 3, 3, 4, 5, 1, 1, false)})
    check_ops({Op::max_pool2d_fwd, Op::max_pool2d_fwd_jvp, Op::max_pool2d_bwd, Op::avg_pool2d_fwd, Op::avg_pool2d_bwd}, s, 2, 2);
}

constexpr std::initializer_list<Op> kNormPoolActOps = {Op::norm_pool_act_fwd,        Op::norm_pool_act_fwd_jvp,
                                                       Op::norm_pool_act_bwd_weight, Op::norm_pool_act_bwd_weight_jvp,
                                                       Op::norm_pool_act_bwd_data,   Op::norm_pool_act_bwd_data_jvp};

NormPoolAct fused(const Pool2d& s, double slope, bool frozen = false, bool pooled = true) {
  return {{s.C, s.H * s.W, 1e-5, frozen}, s, pooled, slope};
}

void norm_pool_acts() {
  struct Sizes {
    NormPoolAct layer;
    int64_t N = 3, stat_N = 3, tasks = 2;
  };
  const auto pixels = [](int64_t C, int64_t H, int64_t W) { return pool(C, H, W, 1, 1, 1, 1, 0, 0, true); };
  for (const Sizes& z : {Sizes{fused(pool(1, 2, 2, 2, 2, 2, 2, 0, 0, true), 0), 1, 1, 1},
                         {fused(pool(3, 5, 7, 2, 2, 2, 2, 0, 0, true), 0)},  // rest pixels
                         {fused(pool(64, 4, 6, 2, 2, 2, 2, 0, 0, true), 0.1)},
                         {fused(pool(8, 6, 5, 2, 2, 2, 2, 0, 0, true), 0.2), 3, 2, 3},
                         {fused(pool(4, 5, 4, 2, 2, 2, 2, 0, 0, true), 0, true)},
                         {fused(pool(5, 6, 7, 3, 3, 3, 3, 0, 0, true), 0.1), 2, 1},
                         {fused(pool(2, 7, 8, 3, 2, 3, 2, 0, 0, true), 0)},
                         {fused(pool(33, 7, 5, 3, 3, 2, 2, 1, 1, true), 0), 2, 2},  // overlapping, padded
                         {fused(pool(8, 5, 5, 3, 3, 1, 1, 1, 1, true), 0.1), 3, 2},
                         {fused(pool(4, 5, 6, 2, 2, 1, 1, 0, 0, true), 0)},  // 2 x 2, overlapping
                         {fused(pool(5, 9, 8, 2, 3, 3, 2, 1, 1, true), 0.3, true)},
                         {fused(pool(6, 4, 5, 3, 3, 4, 5, 1, 1, true), 0)},  // pixels between the windows
                         {fused(pool(4, 3, 4, 1, 1, 2, 2, 0, 0, true), 0)},
                         {fused(pixels(1, 1, 1), 0, false, false), 5, 5, 1},
                         {fused(pixels(3, 1, 1), 0.1, false, false), 5, 3, 3},
                         {fused(pixels(5, 3, 2), 0, true, false)},
                         {fused(pixels(64, 3, 2), 0, false, false)},
                         {fused(pixels(33, 2, 3), 0.1, false, false), 4, 3}})
    check_ops(kNormPoolActOps, z.layer, z.N, z.tasks, z.stat_N);
  for (int64_t C : {3, 4})  // sums in parts
    check_ops({Op::norm_pool_act_bwd_weight, Op::norm_pool_act_bwd_weight_jvp}, fused(pool(C, 46, 122, 2, 2, 2, 2, 0, 0, true), 0), 3, 2);
}

void losses() {
  for (int64_t size : {1, 2, 3, 5, 31, 33, 65})
    for (double smoothing : {0.0, 0.1}) {
      const int64_t N = 1 + 7 * size % 37;
      check_ops({Op::cross_entropy, Op::cross_entropy_jvp}, Loss{Loss::Kind::cross_entropy, size, smoothing}, N, 1 + size % 3);
      if (smoothing == 0) check_ops({Op::mse, Op::mse_jvp}, Loss{Loss::Kind::mse, size, 0}, N, 1 + size % 3);
    }
  check_ops({Op::cross_entropy, Op::cross_entropy_jvp}, Loss{Loss::Kind::cross_entropy, 5, 0.0}, 300, 2);
}

constexpr std::initializer_list<Op> kLinearOps = {Op::linear_fwd,        Op::linear_fwd_jvp,       Op::linear_fwd_dual,
                                                  Op::linear_bwd_data,   Op::linear_bwd_data_jvp,  Op::linear_bwd_data_dual,
                                                  Op::linear_bwd_weight, Op::linear_bwd_weight_jvp};
constexpr std::initializer_list<Op> kConvOps = {Op::conv2d_fwd,        Op::conv2d_fwd_jvp,       Op::conv2d_fwd_dual,
                                                Op::conv2d_bwd_data,   Op::conv2d_bwd_data_jvp,  Op::conv2d_bwd_data_dual,
                                                Op::conv2d_bwd_weight, Op::conv2d_bwd_weight_jvp};

constexpr std::initializer_list<Op> kRectifiedLinearOps = {Op::linear_fwd,      Op::linear_fwd_jvp,      Op::linear_fwd_dual,
                                                           Op::linear_bwd_data, Op::linear_bwd_data_jvp, Op::linear_bwd_data_dual};
constexpr std::initializer_list<Op> kRectifiedConvOps = {Op::conv2d_fwd,      Op::conv2d_fwd_jvp,      Op::conv2d_fwd_dual,
                                                         Op::conv2d_bwd_data, Op::conv2d_bwd_data_jvp, Op::conv2d_bwd_data_dual};

const std::initializer_list<Op>& ops_of(const ProductCase& c) {
  const bool linear = std::holds_alternative<Linear>(c.layer);
  if (rectified_output(c.layer).on) return linear ? kRectifiedLinearOps : kRectifiedConvOps;
  return linear ? kLinearOps : kConvOps;
}

void products() {
  for (const auto& cases : {large_product_cases(), small_product_cases(), rectified_cases()})
    for (const ProductCase& c : cases) check_ops(ops_of(c), c.layer, c.N, c.tasks);
}

// On tensor cores: operands that keep 10 bits of their mantissa, or 21, or 16. Rounded to TF32, each of two factors is off by 2^-11 of
// itself at most. In BF16 high is off by 2^-9, high + low by 2^-18, and low low, which is left out, is 2^-18 of the product at most:
// together 3 2^-18.
void tensor_products() {
  struct Mode {
    const char* name;
    Precision precision;
    double allowed;  // of the largest number of the result, whose rounding errors do not all point the same way
  };
  for (const auto& [mode, precision, allowed] : {Mode{"tf32", Precision::tf32, 0x1p-9},
                                                 {"tf32x3", Precision::tf32x3, double(kTolerance<float>)},
                                                 {"bf16x3", Precision::bf16x3, 0x1p-16}}) {
    double largest = 0;
    std::vector<ProductCase> cases = large_product_cases();
    const std::vector<ProductCase> with_rectifiers = large_rectified_cases();
    cases.insert(cases.end(), with_rectifiers.begin(), with_rectifiers.end());
    for (const ProductCase& sizes : cases)
      for (Op op : ops_of(sizes)) {
        const Case c{op, sizes.layer, sizes.N, sizes.tasks};
        const std::string name = name_of(c, 4, mode);
        Operands given = draw_all<float>(c);
        const std::set<size_t> absent = absences(c)[0];
        for (size_t k : absent) given.values[k].clear();
        const OpTable& table = cuda_emulated_tensor_ops(precision);
        const auto on_tensor_cores = [&](const How& how) { return run<float>(table, c, given, how, emu::allocate, emu::free); };
        const Operands got = on_tensor_cores({});
        const Worst w = worst(c, got, definition(c, given, got));
        report(w.error <= allowed, name, w.where);
        largest = std::max(largest, w.error);
        How unaligned;
        unaligned.aligned = false;
        emu::set_order(emu::Order::random, 5);
        report(same_bits(got, 0, on_tensor_cores(unaligned), c.tasks, op_outputs(op)), name + ": the same bits where nothing is aligned");
        emu::set_order(emu::Order::ascending);
      }
    std::printf("%-7s largest error %.1e, allowed %.1e\n", mode, largest, allowed);
  }
}

// ---------------------------------------------------------------- beside random numbers

// Ties, NaN and infinities: exactly the reference's choices.
template <class T>
void special_numbers() {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  const Vec odd{0, -0.0, nan, inf, -inf, 1, 1, -1, 1, nan, -inf, -inf, 2, 2, -2, 0};
  const auto expect_same = [&](const Case& c, Operands given) {
    const Operands got = on_device<T>(c, given, {}), want = on_reference(c, given, {});
    report(same_bits(got, 0, want, 1, op_outputs(c.op)), name_of(c, sizeof(T), "ties, NaN and infinities"));
  };
  const Vec hole(16, 0.0), ones(16, 1.0);
  for (auto kind : {Pointwise::Kind::relu, Pointwise::Kind::leaky_relu}) {
    const Pointwise s{kind, 0.5, 16};
    expect_same({Op::pointwise_fwd, s, 1, 1}, {{{hole}, {odd}}});
    expect_same({Op::pointwise_bwd, s, 1, 1}, {{{hole}, {odd}, {ones}}});
    expect_same({Op::pointwise_fwd_jvp, s, 1, 1}, {{{hole}, {odd}, {ones}}});
    expect_same({Op::pointwise_bwd_jvp, s, 1, 1}, {{{hole}, {odd}, {ones}, {ones}, {ones}}});
  }
  for (double slope : {0.0, 0.5}) {  // one by one through products
    const Linear s{1, 1, {true, slope}, {true, slope}};
    const Vec one{1}, zero{0};
    expect_same({Op::linear_fwd, s, 16, 1}, {{{hole}, {odd}, {one}, {zero}}});
    expect_same({Op::linear_fwd_jvp, s, 16, 1}, {{{hole}, {ones}, {ones}, {one}, {one}, {zero}, {odd}}});
    expect_same({Op::linear_fwd_dual, s, 16, 1}, {{{hole}, {hole}, {odd}, {ones}, {one}, {one}, {zero}, {zero}}});
    expect_same({Op::linear_bwd_data, s, 16, 1}, {{{hole}, {ones}, {one}, {odd}}});
    expect_same({Op::linear_bwd_data_jvp, s, 16, 1}, {{{hole}, {ones}, {ones}, {one}, {one}, {odd}}});
    expect_same({Op::linear_bwd_data_dual, s, 16, 1}, {{{hole}, {hole}, {ones}, {ones}, {one}, {one}, {odd}}});
  }
  for (int64_t C : {1, 4}) {
    const Pool2d s = pool(C, 16 / C / 2, 2, 2, 2, 1, 1, 0, 0, true);
    const Vec out(size_t(C * s.OH * s.OW), 0.0);
    expect_same({Op::max_pool2d_fwd, s, 1, 1}, {{{out}, {out}, {odd}}});
    Vec stats(size_t(3 * C), 0.0);  // mean 0, deviation 1
    std::fill(stats.begin() + C, stats.begin() + 2 * C, 1.0);
    for (double slope : {0.0, 0.5})
      for (double gamma : {1.0, -1.0, 0.0})
        expect_same({Op::norm_pool_act_fwd, fused(s, slope, true), 1, 1},
                    {{{out}, {out}, {out}, {odd}, {stats}, {Vec(size_t(C), gamma)}, {}}});
  }
  Vec lost(33, 1.0);  // conjugate gradients carry a NaN on
  lost[7] = nan;
  const Vec line(33, 0.0), state(3, 0.0);
  const Operands start = on_device<T>({Op::cg_start, Vector{33}, 1, 1}, {{{line}, {line}, {line}, {state}, {lost}}}, {});
  report(std::isnan(start.values[3][0][0]) && start.values[3][0][2] == 1, "cg_start: a NaN stays active");
  const Operands zero = on_device<T>({Op::cg_start, Vector{33}, 1, 1}, {{{line}, {line}, {line}, {state}, {line}}}, {});
  report(zero.values[3][0][0] == 0 && zero.values[3][0][2] == 0, "cg_start: v = 0 is solved");
}

// |mean| = 10^4 std: statistics and y as exact as the numbers of x. (In float64 the reference itself is not.)
void large_means() {
  for (int64_t rows : {37, 5003}) {
    const Case stats{Op::batch_norm_stats, BatchNorm{5, rows, 1e-12, false}, 1, 1}, fwd{Op::batch_norm_fwd, stats.layer, 1, 1};
    Vec x(size_t(5 * rows));
    for (size_t i = 0; i < x.size(); ++i) x[i] = i % 5 == 4 ? 7.25 : double(float(1000 + 0.1 * uniform(-1, 1)));
    const Vec three(15, 0.0);
    const Operands got = on_device<float>(stats, {{{three}, {x}}}, {}), want = on_reference(stats, {{{three}, {x}}}, {});
    const Operands got_y = on_device<float>(fwd, {{{x}, {x}, {got.values[0][0]}, {}, {}}}, {});
    const Operands want_y = on_reference(fwd, {{{x}, {x}, {want.values[0][0]}, {}, {}}}, {});
    const Worst w = worst(fwd, got_y, want_y);
    report(w.error <= kTolerance<float>, name_of(fwd, 4, "|mean| = 10^4 std"), w.where);
    report(got.values[0][0][4] == 7.25 && got.values[0][0][14] == 0, name_of(stats, 4, "the mean of a constant channel"));
  }
}

template <class T>
void trees() {
  for (int64_t tasks : {1, 2, 3, 5, 7, 8, 9, 11, 31, 33, 63, 64, 65, 100, 130, 1030})
    for (int64_t size : {1, 3, 33, 65})
      for (bool weighted : {false, true}) {
        std::vector<T> tree(static_cast<size_t>(tasks * size)), w(static_cast<size_t>(tasks));
        for (T& v : tree) v = T(uniform(-1.5, 1.5));
        for (T& v : w) v = T(uniform(0, 1));
        T* out = static_cast<T*>(emu::allocate(size_t(size) * sizeof(T)));
        T* x = static_cast<T*>(emu::allocate(tree.size() * sizeof(T)));
        T* weights = static_cast<T*>(emu::allocate(w.size() * sizeof(T)));
        std::copy(tree.begin(), tree.end(), x);
        std::copy(w.begin(), w.end(), weights);
        cuda_emulated_ops(sizeof(T)).tree_reduce(out, x, weighted ? weights : nullptr, tasks, size, size, 0);
        if (weighted)
          for (size_t i = 0; i < tree.size(); ++i) tree[i] *= w[i / size_t(size)];
        for (int64_t stride = 1; stride < tasks; stride *= 2)
          for (int64_t t = 0; t + stride < tasks; t += 2 * stride)
            for (int64_t i = 0; i < size; ++i) tree[size_t(t * size + i)] += tree[size_t((t + stride) * size + i)];
        bool same = true;
        for (int64_t i = 0; i < size; ++i) same = same && out[i] == (weighted ? tree[size_t(i)] : tree[size_t(i)] / T(tasks));
        report(same, "tree_reduce of " + std::to_string(tasks) + " tasks x " + std::to_string(size) + (weighted ? ", weighted" : ""));
        emu::free(out);
        emu::free(x);
        emu::free(weights);
      }
}

// ---------------------------------------------------------------- what ran

void coverage() {
  const std::set<Op> of_the_host{Op::pointwise_fwd_dual, Op::pointwise_bwd_dual,
                                 Op::uniform_update};  // a device takes what they are made of
  for (int op = 0; op < kOps; ++op) {
    if (is_callers(static_cast<Op>(op))) continue;
    const std::string name = op_name(static_cast<Op>(op));
    if (of_the_host.count(static_cast<Op>(op))) {
      report(!cuda_emulated_ops(4).run[op] && !cuda_emulated_ops(8).run[op], name + " is the host's");
      continue;
    }
    report(cuda_emulated_ops(4).run[op] && cuda_emulated_ops(8).run[op], name + " is in the table");
    report(largest_error[0].count(static_cast<Op>(op)) > 0, name + " was tested");
  }
  const std::map<std::string, emu::Kernel> ran = emu::kernels();
  // test_cuda_resident.cpp and test_cuda_device.cpp launch these.
  const auto no_op = [](const std::string& kernel) {
    const auto is = [&](const char* name) { return kernel.find(name) != std::string::npos; };
    return is("8resident") || is("6gather") || is("11copy_pieces");
  };
  size_t missing = 0;
  for (const std::string& kernel : emu::compiled_kernels())
    if (!ran.count(kernel) && !no_op(kernel)) {
      ++missing;
      report(false, "a kernel that never ran", kernel);
    }
  std::printf("%zu kernels, %zu never ran, %ld launches\n", emu::compiled_kernels().size(), missing, long(emu::launches()));
}

void print_errors() {
  for (const auto& [op, error] : largest_error[0])
    std::printf("%-28s largest error %6.1f eps in float32, %6.1f in float64\n", op_name(op), error, largest_error[1][op]);
}

}  // namespace
}  // namespace fastmaml

int main(int count, char** names) {
  using namespace fastmaml;
  const auto timed = [&](const char* name, void (*cases)()) {
    if (count > 1 && std::find(names + 1, names + count, std::string(name)) == names + count) return;
    const auto start = std::chrono::steady_clock::now();
    const int before = passed;
    cases();
    std::printf("%-10s %6d passed, %.1f s\n", name, passed - before,
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  };
  emu::set_order(emu::Order::ascending);
  timed("vectors", vectors);
  timed("pointwise", pointwise);
  timed("norms", norms);
  timed("pools", pools);
  timed("fused", norm_pool_acts);
  timed("losses", losses);
  timed("products", products);
  timed("tensor", tensor_products);
  timed("special", [] {
    special_numbers<float>();
    special_numbers<double>();
    large_means();
    trees<float>();
    trees<double>();
  });
  print_errors();
  if (count == 1) coverage();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
