// Questions of Python about networks, inner loops and plans. Nothing here runs a plan.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "plan/plan.h"

namespace fastmaml {

// The plan of a call with these sizes and options.
std::shared_ptr<const Plan> plan_asked_for(const std::string& program, const std::string& kind, const std::string& backend,
                                           int64_t real_bytes, int64_t support_examples, int64_t query_examples, const std::string& loop,
                                           const std::string& memory, int solve_steps, bool uniform_rate);
std::string steps_of(const Plan& plan);
size_t arena_bytes_of(const Plan& plan);
int lanes_of(const Plan& plan);
std::string walk_of(const Plan& plan);

std::vector<int64_t> output_shape(const std::string& text);                      // for one example, in torch's order
pybind11::dict loop_sizes(const std::string& program, const std::string& text);  // the sizes that set the shapes of an inner loop's results
// (tape, tape_index, tape_tap): elements for each task that linearise returns
std::tuple<int64_t, int64_t, int64_t> tape_sizes_of(const std::string& program, const std::string& backend, bool gauss_newton,
                                                    int64_t real_bytes, int64_t examples, bool weights);

pybind11::dict vocabulary();  // the lists that the engine is made from

#ifdef __linux__
// By symbol: (launches, readable name).
std::map<std::string, std::pair<int64_t, std::string>> emulated_kernels();
#endif

}  // namespace fastmaml
