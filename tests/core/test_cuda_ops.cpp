// The ops of the emulated CUDA table but for products, each against the reference (cuda_op_checks.h), and on numbers that are not random.
#include <array>

#include "cuda_op_checks.h"

namespace fastmaml {
namespace {

// ---------------------------------------------------------------- cases

void vectors() {
  for (int64_t size : {1, 2, 3, 5, 31, 33, 65, 1030}) {
    const int64_t tasks = 1 + size % 3;
    check_ops({Op::fill_zero, Op::copy, Op::add, Op::sgd_update, Op::scale_by_rate, Op::rate_grad, Op::adjoint_update, Op::sgd_adjoint},
              Vector{size}, 1, tasks);
    check_ops({Op::cg_start, Op::cg_step}, Vector{size}, 1, 3);
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
  for (Pointwise::Kind kind : kPointwise)
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
  const Vec line(33, 0.0), state(5, 0.0), history(1, 0.0);
  const Operands start = on_device<T>({Op::cg_start, Vector{33}, 1, 1}, {{{line}, {line}, {line}, {state}, {history}, {lost}}}, {});
  report(std::isnan(start.values[3][0][0]) && start.values[3][0][2] == 1, "cg_start: a NaN stays active");
  const Operands zero = on_device<T>({Op::cg_start, Vector{33}, 1, 1}, {{{line}, {line}, {line}, {state}, {history}, {line}}}, {});
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

}  // namespace
}  // namespace fastmaml

int main(int count, char** names) {
  using namespace fastmaml;
  return run_groups({{"vectors", vectors},
                     {"pointwise", pointwise},
                     {"norms", norms},
                     {"pools", pools},
                     {"fused", norm_pool_acts},
                     {"losses", losses},
                     {"special",
                      [] {
                        special_numbers<float>();
                        special_numbers<double>();
                        large_means();
                        trees<float>();
                        trees<double>();
                      }}},
                    count, names, is_no_product);
}
