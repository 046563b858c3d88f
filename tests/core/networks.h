// Small Programs and random arguments for the C++ tests: what a binding would hand in, without Python.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "meta/meta.h"
#include "ops/ops.h"

namespace fastmaml {

inline const char* const kMlp = R"(fastmaml 1
input 3
param 0 9 3
param 27 9
param 36 2 9
param 54 2
linear 0 weight=0 bias=1
tanh 1
linear 2 weight=2 bias=3
output 3
loss mse
)";

// Residual convolutions with batch norm, pooling and a classifier: most ops, branches included.
inline const char* const kConvnet = R"(fastmaml 1
input 2 7 6
param 0 5 2 3 3
param 90 5
param 95 5
param 100 5
param 105 5 5 3 3
param 330 5
param 335 3 45
param 470 3
conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1
batch_norm 1 weight=2 bias=3 eps=1e-5 mode=batch
relu 2
conv2d 3 weight=4 bias=5 stride=1,1 padding=1,1
add 3,4
max_pool2d 5 kernel=2,2 stride=2,2 padding=0,0
silu 6
flatten 7
linear 8 weight=6 bias=7
output 9
loss cross_entropy smoothing=0.1
)";

inline const char* const kRectifiedMlp = R"(fastmaml 1
input 3
param 0 9 3
param 27 9
param 36 7 9
param 99 2 7
param 113 2
linear 0 weight=0 bias=1
relu 1
linear 2 weight=2 bias=-1
leaky_relu 3 slope=0.2
linear 4 weight=3 bias=4
output 5
loss mse
)";

// Rectifiers behind and before every layer that takes them, one through a flatten, one with two readers.
inline const char* const kRectified = R"(fastmaml 1
input 2 5 6
param 0 5 2 3 3
param 90 5
param 95 4 5 3 2
param 215 4
param 219 4
param 223 4 4 1 1
param 239 3 4 2 2
param 287 5 36
param 467 5
param 472 5
param 477 3 5
param 492 3
conv2d 0 weight=0 bias=1 stride=1,1 padding=1,1
leaky_relu 1 slope=0.3
conv2d 2 weight=2 bias=-1 stride=2,1 padding=1,0
group_norm 3 weight=3 bias=4 groups=2 eps=1e-3
relu 4
conv2d 5 weight=5 bias=-1 stride=1,1 padding=0,0
add 5,6
group_norm 7 weight=-1 bias=-1 groups=1 eps=1e-3
relu 8
conv2d 9 weight=6 bias=-1 stride=1,2 padding=1,1
relu 10
flatten 11
linear 12 weight=7 bias=8
layer_norm 13 weight=9 bias=-1 dims=1 eps=1e-3
leaky_relu 14 slope=0.1
linear 15 weight=10 bias=11
output 16
loss cross_entropy smoothing=0.1
)";

// Every argument of a schedule, filled with reproducible numbers; results are zero until a run writes them.
template <class T>
struct Arguments {
  std::vector<std::vector<T>> real;
  std::vector<std::vector<int64_t>> label;
  View views[kArgs];

  Arguments(const Schedule& schedule, int64_t tasks, int64_t classes, unsigned seed = 7) : real(kArgs), label(kArgs) {
    for (const Slot& slot : schedule.slots) {
      if (slot.arg == Arg::none) continue;
      const int a = static_cast<int>(slot.arg);
      std::mt19937 random(seed + unsigned(a));
      std::normal_distribution<double> normal(0.0, 0.5);
      const auto is = [&](std::initializer_list<Arg> any) { return std::find(any.begin(), any.end(), slot.arg) != any.end(); };
      const bool shared = is({Arg::params, Arg::rates, Arg::loss_weights, Arg::step_rows, Arg::lam, Arg::mask});
      const size_t n = size_t(slot.size * (shared ? 1 : tasks));
      if (slot.type == Type::label) {
        for (size_t i = 0; i < n; ++i) label[a].push_back(int64_t(random() % unsigned(classes)));
        views[a] = {label[a].data(), slot.size, 1};
        continue;
      }
      const auto number = [&](size_t i, double v) {
        if (slot.arg >= Arg::loss) return 0.0;  // a result
        if (slot.arg == Arg::mask) return double(i % 3 > 0);
        if (slot.arg == Arg::cg_settings) return i % 3 < 2 ? 2.0 : 0.0;  // lam, damping, and a stop that is never reached
        return is({Arg::rates, Arg::lam, Arg::loss_weights}) ? 0.1 + 0.01 * v : v;
      };
      for (size_t i = 0; i < n; ++i) real[a].push_back(T(number(i, normal(random))));
      views[a] = {real[a].data(), shared ? 0 : slot.size, 1};
    }
  }
};

}  // namespace fastmaml
