#include "bindings/parameter_list.h"

#include <torch/csrc/stable/ops.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bindings/executor.h"

namespace fastmaml {
namespace {

using torch::headeronly::ScalarType;

template <class Real>
void scale_into(const Tensor& to, const Tensor& flat, int64_t first, Real scale) {
  Real* out = static_cast<Real*>(to.mutable_data_ptr());
  const Real* in = static_cast<const Real*>(flat.const_data_ptr());
  const int64_t step = flat.stride(0), count = to.numel();
  for (int64_t i = 0; i < count; ++i) out[i] = in[(first + i) * step] * scale;
}

}  // namespace

Tensor concatenated(const std::vector<Tensor>& parts) {
  if (parts.size() == 1 && parts[0].dim() == 1) return parts[0];
  if (parts.empty()) throw std::invalid_argument("the list of parameters is empty");
  const ScalarType type = parts[0].scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) throw std::invalid_argument("parameters must be float32 or float64");
  int64_t size = 0;
  for (const Tensor& part : parts) {
    if (!part.is_cpu() || part.scalar_type() != type) throw std::invalid_argument("parameters must have one type and be on the CPU");
    size += part.numel();
  }
  const Tensor flat = host_executor()->empty({size}, type);
  auto* to = static_cast<std::byte*>(flat.mutable_data_ptr());
  for (const Tensor& part : parts) {
    const Tensor whole = part.is_contiguous() ? part : torch::stable::contiguous(part);
    const size_t bytes = size_t(whole.numel()) * (type == ScalarType::Float ? sizeof(float) : sizeof(double));
    if (bytes) std::memcpy(to, whole.const_data_ptr(), bytes);
    to += bytes;
  }
  return flat;
}

std::vector<Tensor> scaled_parts_call(const Tensor& flat, const Tensor& scale, const std::vector<int64_t>& shapes) {
  const ScalarType type = flat.scalar_type();
  const bool fits = flat.is_cpu() && scale.is_cpu() && flat.dim() == 1 && scale.numel() == 1 && scale.scalar_type() == type &&
                    (type == ScalarType::Float || type == ScalarType::Double);
  if (!fits) throw std::invalid_argument("scaled_parts takes a vector and a scale of one type, float32 or float64, on the CPU");
  const auto misfit = [&] {
    return std::invalid_argument("shapes must hold " + std::to_string(flat.numel()) + " numbers in all, as the vector does");
  };
  const auto executor = host_executor();
  std::vector<Tensor> parts;
  int64_t first = 0;
  for (size_t at = 0; at < shapes.size();) {
    const int64_t dims = shapes[at++];
    if (dims < 0 || size_t(dims) > shapes.size() - at) throw std::invalid_argument("shapes end within a shape");
    const std::vector<int64_t> sizes(shapes.begin() + int64_t(at), shapes.begin() + int64_t(at) + dims);
    at += size_t(dims);
    Tensor part = executor->empty(sizes, type);
    if (part.numel() > flat.numel() - first) throw misfit();
    if (type == ScalarType::Float)
      scale_into(part, flat, first, *static_cast<const float*>(scale.const_data_ptr()));
    else
      scale_into(part, flat, first, *static_cast<const double*>(scale.const_data_ptr()));
    first += part.numel();
    parts.push_back(std::move(part));
  }
  if (first != flat.numel()) throw misfit();
  return parts;
}

}  // namespace fastmaml
