// The operators' functions: one for each, with the schema's arguments in order (module.cpp).
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "bindings/arguments.h"

namespace fastmaml {

using MaybeTensor = std::optional<Tensor>;

Tensor forward_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                    const MaybeTensor& support_x, const Tensor& buffers);

std::tuple<Tensor, Tensor> grad_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                     const Tensor& y, const MaybeTensor& weights, const Tensor& buffers);

Tensor hvp_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x, const Tensor& y,
                const MaybeTensor& weights, const Tensor& v, const Tensor& buffers);

// Computes once all that hvp would repeat for every direction. Pass (tape, tape_index, tape_tap) to curvature_call with equal arguments.
std::tuple<Tensor, Tensor, Tensor> linearise_call(const std::string& program, const std::string& backend, bool gauss_newton,
                                                  const Tensor& params, const Tensor& x, const Tensor& y, const MaybeTensor& weights,
                                                  const Tensor& buffers);

Tensor curvature_call(const std::string& program, const std::string& backend, bool gauss_newton, const Tensor& params, const Tensor& x,
                      const Tensor& y, const MaybeTensor& weights, const Tensor& tape, const Tensor& tape_index, const Tensor& tape_tap,
                      const Tensor& v, const Tensor& buffers);

std::tuple<Tensor, Tensor> vjp_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                    const Tensor& dy, const Tensor& buffers);

std::tuple<Tensor, Tensor, Tensor> adapt_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                              const Tensor& y, const MaybeTensor& weights, const Tensor& rates, const std::string& loop,
                                              const MaybeTensor& step_rows, const MaybeTensor& lam, const MaybeTensor& mask,
                                              const MaybeTensor& state, const MaybeTensor& step_count, const Tensor& buffers);

using MetaGradientResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
MetaGradientResults meta_gradient_call(const std::string& program, const std::string& backend, const Tensor& theta, const Tensor& support_x,
                                       const Tensor& support_y, const MaybeTensor& support_weights, const Tensor& query_x,
                                       const Tensor& query_y, const MaybeTensor& query_weights, const MaybeTensor& task_weights,
                                       const Tensor& rates, const std::string& loop, const std::string& memory,
                                       const MaybeTensor& loss_weights, const MaybeTensor& step_rows, const MaybeTensor& lam,
                                       const MaybeTensor& mask, const Tensor& buffers);

// meta_gradient on the host with one rate for all parameters and without options. theta: parts (parameter_list.h).
MetaGradientResults plain_meta_gradient_call(const std::string& program, const std::string& backend, const std::vector<Tensor>& theta,
                                             const Tensor& support_x, const Tensor& support_y, const Tensor& query_x, const Tensor& query_y,
                                             double rate, const std::string& loop, const std::string& memory);

// (solution, residuals before the first step and after each, state of cg_step in program/op.h)
std::tuple<Tensor, Tensor, Tensor> solve_call(const std::string& program, const std::string& backend, const Tensor& params, const Tensor& x,
                                              const Tensor& y, const MaybeTensor& weights, const Tensor& v, const MaybeTensor& mask,
                                              double lam, int64_t steps, double damping, double stop, const Tensor& buffers);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> passes_call(const std::string& program, const std::string& backend, bool dual,
                                                                       const Tensor& params, const Tensor& params_dot, const Tensor& x,
                                                                       const Tensor& x_dot, const Tensor& dy, const Tensor& dy_dot,
                                                                       const Tensor& buffers);

}  // namespace fastmaml
