// Clipping of a gradient and its adjoint (ALGORITHMS section 1.2).     all [P]
#include <algorithm>
#include <cmath>

#include "reference/reference.h"

namespace fastmaml::reference {

namespace {

bool counts(const Real& mask, int64_t i) { return !mask || mask[i] != 0; }

double norm(const Real& g, const Real& mask, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i)
    if (counts(mask, i)) sum += g[i] * g[i];
  return std::sqrt(sum);
}

}  // namespace

// clipped = g between -limit and limit; NaN stays
void clip_value(const Call& call) {
  const Clip& clip = call.shape<Clip>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real clipped = real(call, 0, task), g = real(call, 1, task);
    for (int64_t i = 0; i < clip.size; ++i) clipped[i] = std::clamp(g[i], -clip.limit, clip.limit);
  }
}

// u_raw = u where |g| <= limit, else 0
void clip_value_adjoint(const Call& call) {
  const Clip& clip = call.shape<Clip>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real u_raw = real(call, 0, task), u = real(call, 1, task), g = real(call, 2, task);
    for (int64_t i = 0; i < clip.size; ++i) u_raw[i] = std::fabs(g[i]) <= clip.limit ? u[i] : 0;
  }
}

// n = |g|,  clipped = limit / n g where n > limit, else g
void clip_norm(const Call& call) {
  const Clip& clip = call.shape<Clip>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real clipped = real(call, 0, task), g = real(call, 1, task), mask = real(call, 2, task);
    const double n = norm(g, mask, clip.size), scale = n > clip.limit ? clip.limit / n : 1;
    for (int64_t i = 0; i < clip.size; ++i) clipped[i] = scale * g[i];
  }
}

// u_raw = limit / n (u - ghat <ghat, u>) with ghat = g / n, where n > limit; the entries that do not count are scaled too
void clip_norm_adjoint(const Call& call) {
  const Clip& clip = call.shape<Clip>();
  for (int64_t task = 0; task < call.tasks; ++task) {
    const Real u_raw = real(call, 0, task), u = real(call, 1, task), g = real(call, 2, task), mask = real(call, 3, task);
    const double n = norm(g, mask, clip.size);
    const bool clips = n > clip.limit;
    double along = 0;
    for (int64_t i = 0; i < clip.size; ++i) along += g[i] / n * u[i];
    for (int64_t i = 0; i < clip.size; ++i) {
      const double part = counts(mask, i) ? g[i] / n * along : 0;
      u_raw[i] = clips ? clip.limit / n * (u[i] - part) : u[i];
    }
  }
}

}  // namespace fastmaml::reference
