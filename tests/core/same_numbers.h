// Whether two Schedules compute the same, in float64; and the report of the tests that ask it.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "networks.h"

namespace fastmaml {

inline int passed = 0, failed = 0;

inline void report(bool ok, const std::string& what, const std::string& detail = "") {
  ok ? ++passed : ++failed;
  std::printf("%s  %s  %s\n", ok ? "ok  " : "FAIL", what.c_str(), detail.c_str());
}

using Results = std::vector<std::vector<double>>;

inline Results results(const Schedule& schedule, const OpTable& table = reference_ops()) {
  constexpr int64_t kTasks = 2;
  Arguments<double> arguments(schedule, kTasks, 3);
  for (double& v : arguments.real[static_cast<int>(Arg::buffers)]) v = std::fabs(v) + 0.1;
  Arenas arenas;
  run_layered({table, schedule, plan_workspace(schedule, table), arguments.views, kTasks}, arenas);
  return {arguments.real.begin() + static_cast<int>(Arg::loss), arguments.real.end()};
}

// The largest difference as a share of the largest number of its result; infinite where everything is zero or something is NaN.
inline double apart(const Results& want, const Results& got) {
  double worst = 0, largest = 0;
  for (size_t a = 0; a < want.size(); ++a) {
    double scale = 0;
    for (double v : want[a]) scale = std::max(scale, std::fabs(v));
    largest = std::max(largest, scale);
    for (size_t i = 0; i < want[a].size(); ++i) {
      const double error = std::fabs(got[a][i] - want[a][i]) / (scale > 0 ? scale : 1);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  }
  return largest > 0 ? worst : INFINITY;
}

}  // namespace fastmaml
